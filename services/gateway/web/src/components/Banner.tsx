import { useSignal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect } from "preact/hooks";
import { download } from "../chat/export";
import { isRunning } from "../training/progress";
import { usePage } from "./context";

/** The problems of the server and of the storage, the most urgent first, each with the action that helps, if any. */
export function Banners() {
  const { app, training } = usePage();
  const { store } = app;
  const learning = training.progress.value !== null && isRunning(training.progress.value);
  const server = app.health.state.value;
  const busy = app.busy.current.value;
  return (
    <div class="banners">
      {server === "unreachable" && (
        <Banner kind="danger" state="unreachable" text="The server cannot be reached. This page reconnects by itself.">
          <Action label="Retry now" onClick={() => void app.health.check()} />
        </Banner>
      )}
      {server === "loading" && !learning && (
        <Banner
          kind="warning"
          state="loading"
          text={`The model is not ready: ${app.health.waitsFor.value ?? "it is loading or restarting."} This page goes on by itself.`}
        >
          <Action label="Check now" onClick={() => void app.health.check()} />
        </Banner>
      )}
      {busy && server !== "loading" && server !== "unreachable" && (
        <Banner
          kind="warning"
          state="busy"
          text={
            <>
              The server is busy. Your message is sent again <Countdown until={busy.until} />.
            </>
          }
        >
          <Action label="Retry now" onClick={busy.retryNow} />
        </Banner>
      )}
      {store.refusal.value === "full" && (
        <Banner
          kind="warning"
          state="storage-full"
          text="This browser's storage is full: new messages are not kept. Export or delete old conversations to make room."
        />
      )}
      {store.refusal.value === "blocked" && (
        <Banner
          kind="warning"
          state="storage-blocked"
          text="This browser keeps no data for this page: conversations end when it is closed."
        />
      )}
      {store.damaged.value.length > 0 && (
        <Banner kind="warning" state="storage-damaged" text="Some stored conversations cannot be read.">
          <Action
            label="Save a copy"
            onClick={() => download("nanochat-damaged.txt", "text/plain", store.damagedText())}
          />
          <Action label="Discard" onClick={() => store.discardDamaged()} />
        </Banner>
      )}
    </div>
  );
}

interface BannerProps {
  kind: "danger" | "warning";
  state: string;
  text: ComponentChildren;
  children?: ComponentChildren;
}

function Banner({ kind, state, text, children }: BannerProps) {
  return (
    <div class={`banner ${kind}`} role="status" data-testid="banner" data-state={state}>
      <p>{text}</p>
      {children}
    </div>
  );
}

function Action({ label, onClick }: { label: string; onClick: () => void }) {
  return (
    <button type="button" class="button" onClick={onClick}>
      {label}
    </button>
  );
}

/** A countdown such as "in 4 s". Screen readers do not announce each second. */
function Countdown({ until }: { until: number }) {
  const now = useSignal(Date.now());
  useEffect(() => {
    const timer = setInterval(() => (now.value = Date.now()), 500);
    return () => clearInterval(timer);
  }, []);
  const seconds = Math.max(1, Math.ceil((until - now.value) / 1000));
  return <span aria-live="off">in {seconds} s</span>;
}
