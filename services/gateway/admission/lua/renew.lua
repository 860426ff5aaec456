-- Renews the leases of running answers, even if Redis has forgotten them.
-- KEYS: the caller's running answers.
-- ARGV: time in microseconds or -1 for Redis's clock, lease in microseconds, ids of answers.
local expires = string.format('%.0f', clock(tonumber(ARGV[1])) + tonumber(ARGV[2]))
for index = 3, #ARGV do redis.call('ZADD', KEYS[1], expires, ARGV[index]) end
forget_in(KEYS[1], tonumber(ARGV[2]))
