-- Computes the same as buckets.py. RedisLink puts this text in front of each of the other scripts.
local UNITS = 60000000

local function clock(given)
  if given >= 0 then return given end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function leaked(key, name, limit, now)
  local stored = redis.call('HMGET', key, name .. '_spent', name .. '_at')
  local spent, at = tonumber(stored[1] or 0), tonumber(stored[2] or 0)
  if limit == 0 then return {limit = limit, spent = 0, at = math.max(at, now)} end
  return {limit = limit, spent = math.max(0, spent - limit * math.max(0, now - at)), at = math.max(at, now)}
end

-- Divides whole numbers and rounds up. All numbers are below 2^53, so the inexact quotient has the right whole part.
local function divided_up(number, divisor)
  return math.floor((number + divisor - 1) / divisor)
end

local function room_in(bucket, cost)
  return math.max(0, divided_up(bucket.spent + cost * UNITS - bucket.limit * UNITS, bucket.limit))
end

local function empty_in(bucket)
  if bucket.limit == 0 then return 0 end
  return divided_up(bucket.spent, bucket.limit)
end

local function remaining(bucket)
  return math.floor(math.max(0, bucket.limit * UNITS - bucket.spent) / UNITS)
end

local function has_room(bucket, cost)
  return bucket.limit == 0 or bucket.spent + cost * UNITS <= bucket.limit * UNITS
end

local function add(bucket, cost)
  if bucket.limit > 0 then bucket.spent = math.max(0, bucket.spent + cost * UNITS) end
end

-- Stores numbers as whole numbers, because Lua's own conversion to text would round them to 14 digits.
local function store(key, name, bucket)
  redis.call('HSET', key, name .. '_spent', string.format('%.0f', bucket.spent),
    name .. '_at', string.format('%.0f', bucket.at))
end

-- A missing bucket counts as empty, so Redis may forget a caller a minute after everything has leaked.
local function forget_in(key, microseconds)
  redis.call('PEXPIRE', key, math.floor(microseconds / 1000) + 60000)
end
