import type { EngineStatus, KeyUsage, LimitSet, Status } from "../api/status";
import type { Rates, StatusApp } from "../status/status-app";
import { rate } from "../text/format";

/** The operator's page: engines, load, cache hits, keys and limits. */
export function StatusPage({ app }: { app: StatusApp }) {
  const status = app.status.value;
  const problem = app.problem.value;
  return (
    <div class="report-page status-page">
      <header class="header">
        <h1>Status</h1>
        <a class="button" href="./">
          Chat
        </a>
      </header>
      <main data-testid="status" data-state={problem ?? (status ? "live" : "loading")}>
        {problem === "key" && <KeyForm app={app} />}
        {problem === "unreachable" && <Note text="The server cannot be reached. This page reconnects by itself." />}
        {problem === "failed" && <Note text="The server could not give its status. This page tries again." />}
        {status && (
          <>
            <Gateway status={status} rates={app.rates.value} />
            <Engines engines={status.engines} />
            <Keys status={status} />
          </>
        )}
      </main>
    </div>
  );
}

function Note({ text }: { text: string }) {
  return (
    <p class="report-note" role="status">
      {text}
    </p>
  );
}

function KeyForm({ app }: { app: StatusApp }) {
  return (
    <form
      class="key-form"
      onSubmit={(event) => {
        event.preventDefault();
        app.key.value = String(new FormData(event.currentTarget).get("key")).trim();
        void app.read();
      }}
    >
      <label for="key">API key with the scope “admin”</label>
      <input id="key" name="key" type="password" autocomplete="off" required data-testid="admin-key" />
      <button type="submit" class="button primary">
        Show
      </button>
      {app.key.value !== "" && (
        <p class="status-error" role="alert">
          The server does not accept this key here.
        </p>
      )}
      <p class="hint">
        <code>nanochat keys create --name operator --scopes admin</code> makes one. It is kept until this tab is closed.
      </p>
    </form>
  );
}

function Gateway({ status, rates }: { status: Status; rates: Rates | null }) {
  const { gateway } = status;
  const cached = gateway.prompt_tokens > 0 ? gateway.cached_prompt_tokens / gateway.prompt_tokens : 0;
  return (
    <section>
      <h2>Gateway</h2>
      {gateway.draining && <Note text="This gateway is shutting down." />}
      <dl class="figures">
        <Figure name="Requests in flight" value={number(gateway.requests_in_flight)} />
        <Figure name="Waiting for an engine" value={number(gateway.queue_length)} />
        <Figure name="Prompt tokens/s" value={rates ? rate(rates.prompt) : "…"} />
        <Figure name="Answer tokens/s" value={rates ? rate(rates.generation) : "…"} />
        <Figure name="Prompt tokens from caches" value={percent(cached)} />
        <Figure name="Answers lost" value={number(gateway.streams_lost)} />
      </dl>
    </section>
  );
}

function Figure({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

function Engines({ engines }: { engines: readonly EngineStatus[] }) {
  if (engines.length === 0) return <Note text="No engine has been found yet." />;
  return (
    <section>
      <h2>Engines</h2>
      <table class="status-table" data-testid="engines">
        <thead>
          <tr>
            <th scope="col">Address</th>
            <th scope="col">Model</th>
            <th scope="col">Running</th>
            <th scope="col">Waiting</th>
            <th scope="col">In Python</th>
            <th scope="col">KV cache</th>
          </tr>
        </thead>
        <tbody>
          {engines.map((engine) => (
            <tr key={engine.address} data-up={engine.up}>
              <th scope="row">
                {engine.address}
                {!engine.up && <span class="status-error"> {engine.why_down ?? "its model is not known yet"}</span>}
              </th>
              <td>{engine.model === null ? "…" : `${engine.model} ${engine.revision}`}</td>
              <td>{number(engine.running)}</td>
              <td>
                {number(engine.waiting)}
                {engine.waiting_tokens > 0 && <span class="faint"> {number(engine.waiting_tokens)} tokens</span>}
              </td>
              <td>{number(engine.parked)}</td>
              <td>
                <meter min={0} max={1} high={0.9} value={engine.kv_use} aria-label={`KV cache of ${engine.address}`} />{" "}
                {percent(engine.kv_use)}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}

function Keys({ status: { keys, usage, limits } }: { status: Status }) {
  const rows = [
    ...keys.map(({ id, name, scopes, state, limits: own }) => ({
      id,
      name,
      scopes: scopes.join(", "),
      state,
      limits: own ?? limits,
    })),
    { id: "anonymous", name: "Without a key", scopes: "", state: "active", limits },
  ];
  return (
    <section>
      <h2>Keys, with their usage of 7 days</h2>
      <table class="status-table" data-testid="keys">
        <thead>
          <tr>
            <th scope="col">Name</th>
            <th scope="col">May</th>
            <th scope="col">Limits</th>
            <th scope="col">Requests</th>
            <th scope="col">Refused</th>
            <th scope="col">Prompt tokens</th>
            <th scope="col">Answer tokens</th>
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => {
            const used = usageOf(row.id, usage);
            return (
              <tr key={row.id} data-up={row.state === "active"}>
                <th scope="row">
                  {row.name} {row.state !== "active" && <span class="faint">({row.state})</span>}
                </th>
                <td>{row.scopes}</td>
                <td>{limitText(row.limits)}</td>
                <td>{number(used.requests)}</td>
                <td>{number(used.refused)}</td>
                <td>{number(used.prompt_tokens)}</td>
                <td>{number(used.completion_tokens)}</td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </section>
  );
}

function usageOf(key: string, usage: readonly KeyUsage[]): Omit<KeyUsage, "day" | "key"> {
  const sum = { requests: 0, refused: 0, prompt_tokens: 0, completion_tokens: 0 };
  for (const day of usage) {
    if (day.key !== key) continue;
    for (const name of Object.keys(sum) as (keyof typeof sum)[]) sum[name] += day[name];
  }
  return sum;
}

function limitText({ requests, tokens, answers }: LimitSet): string {
  const parts = [
    requests > 0 && `${number(requests)} requests/min`,
    tokens > 0 && `${number(tokens)} tokens/min`,
    answers > 0 && `${number(answers)} at once`,
  ];
  return parts.filter(Boolean).join(", ") || "none";
}

function number(value: number): string {
  return value.toLocaleString("en");
}

function percent(share: number): string {
  return `${Math.round(share * 100)} %`;
}
