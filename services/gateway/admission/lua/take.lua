-- Counts a request's whole cost, or nothing if a limit has no room for it.
-- KEYS: the caller's buckets, the caller's running answers.
-- ARGV: time in microseconds or -1 for Redis's clock; limit and cost of requests; limit and cost of tokens; limit of
--   answers; id of the answer or ''; lease of an answer in microseconds.
-- Returns: the limit that refuses or '', and the numbers of a Verdict in limiter.py.
local now = clock(tonumber(ARGV[1]))
local requests, tokens = leaked(KEYS[1], 'requests', tonumber(ARGV[2]), now), leaked(KEYS[1], 'tokens', tonumber(ARGV[4]), now)
local request_cost, token_cost, answer_limit = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local answer, lease = ARGV[7], tonumber(ARGV[8])

local refused, retry = '', 0
if not has_room(requests, request_cost) then
  refused, retry = 'requests', room_in(requests, request_cost)
elseif not has_room(tokens, token_cost) then
  refused, retry = 'tokens', room_in(tokens, token_cost)
elseif answer_limit > 0 and answer ~= '' then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now))
  if redis.call('ZCARD', KEYS[2]) >= answer_limit then refused = 'answers' end
end

if refused == '' then
  add(requests, request_cost)
  add(tokens, token_cost)
  store(KEYS[1], 'requests', requests)
  store(KEYS[1], 'tokens', tokens)
  forget_in(KEYS[1], math.max(empty_in(requests), empty_in(tokens)))
  if answer_limit > 0 and answer ~= '' then
    redis.call('ZADD', KEYS[2], string.format('%.0f', now + lease), answer)
    forget_in(KEYS[2], lease)
  end
end
return {refused, retry, remaining(requests), empty_in(requests), remaining(tokens), empty_in(tokens)}
