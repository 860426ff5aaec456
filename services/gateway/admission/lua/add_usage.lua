-- Adds usage to the counters of the days exactly once.
-- KEYS: number of the last batch that this gateway has added; then, for each addition, the counters of its day.
-- ARGV: number of this batch, seconds for which Redis keeps the counters; then field and amount of each addition.
local batch = tonumber(ARGV[1])
if tonumber(redis.call('GET', KEYS[1]) or 0) >= batch then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', 86400)
for index = 2, #KEYS do
  redis.call('HINCRBY', KEYS[index], ARGV[2 * index - 1], ARGV[2 * index])
  redis.call('EXPIRE', KEYS[index], ARGV[2])
end
return 1
