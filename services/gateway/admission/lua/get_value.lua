-- Returns a value that put_value.lua has stored; nil if there is no such value, or if it has expired.
-- KEYS: hash from names to values, sorted set of the names by the time when a value expires. ARGV: name.
local ends = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not ends or tonumber(ends) <= clock(-1) then return nil end
return redis.call('HGET', KEYS[1], ARGV[1])
