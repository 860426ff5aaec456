-- Corrects the tokens of a finished request and ends its answer.
-- KEYS: the caller's buckets, the caller's running answers.
-- ARGV: time in microseconds or -1 for Redis's clock, limit of tokens, used minus reserved tokens, id of the answer or ''.
local limit, tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
if limit > 0 and tokens ~= 0 then
  local bucket = leaked(KEYS[1], 'tokens', limit, clock(tonumber(ARGV[1])))
  add(bucket, tokens)
  store(KEYS[1], 'tokens', bucket)
  forget_in(KEYS[1], math.max(empty_in(bucket), 60000000, redis.call('PTTL', KEYS[1]) * 1000))
end
if ARGV[4] ~= '' then redis.call('ZREM', KEYS[2], ARGV[4]) end
