-- Replaces the record of a key if it has not changed meanwhile.
-- KEYS: all records, their version. ARGV: id, the expected record or '' for a new key, the new record, largest number of
-- records.
-- Returns: 1 if the record was replaced, 0 if it was not the expected one, -1 if there are too many records.
local current = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if current ~= ARGV[2] then return 0 end
if current == '' and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('INCR', KEYS[2])
return 1
