-- Stores a value for a while. Then deletes expired values. While all values together exceed the size limit, the value
-- that expires first is deleted, too.
-- KEYS: hash from names to values, sorted set of the names by the time when a value expires, bytes of all values.
-- ARGV: name, value, seconds to keep the value, largest number of bytes of all values.
local function bytes(name)
  local length = redis.call('HSTRLEN', KEYS[1], name)
  return length == 0 and 0 or length + #name + 256 -- Redis needs about 256 bytes for an entry
end

local now, most = clock(-1), tonumber(ARGV[4])
local before = bytes(ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], string.format('%.0f', now + tonumber(ARGV[3]) * 1000000), ARGV[1])
local all = redis.call('INCRBY', KEYS[3], bytes(ARGV[1]) - before)
local name, ends = unpack(redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES'))
while name and (tonumber(ends) <= now or all > most) do
  all = redis.call('DECRBY', KEYS[3], bytes(name))
  redis.call('HDEL', KEYS[1], name)
  redis.call('ZREM', KEYS[2], name)
  name, ends = unpack(redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES'))
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[3]) end
