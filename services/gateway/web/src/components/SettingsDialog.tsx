import { useEffect, useRef } from "preact/hooks";
import { DEFAULTS, LIMITS, type Settings } from "../storage/settings";
import { IconButton } from "./IconButton";
import { usePage } from "./context";
import { NumberField, SliderField, TextField } from "./fields";
import { CloseIcon } from "./icons";

export function SettingsDialog() {
  const { app } = usePage();
  const dialog = useRef<HTMLDialogElement>(null);
  const open = app.settingsOpen.value;
  useEffect(() => {
    if (open) dialog.current!.showModal();
    else dialog.current!.close();
  }, [open]);
  const close = () => (app.settingsOpen.value = false);
  return (
    <dialog
      ref={dialog}
      class="settings"
      aria-labelledby="settings-title"
      data-testid="settings"
      onClose={close}
      onClick={(event) => event.target === dialog.current && close()}
    >
      {open && <Panel onClose={close} />}
    </dialog>
  );
}

function Panel({ onClose }: { onClose: () => void }) {
  const { app } = usePage();
  const settings = app.settings.value;
  const set = (change: Partial<Settings>) => (app.settings.value = { ...app.settings.value, ...change });
  const reset = () => set({ ...DEFAULTS, apiKey: settings.apiKey, model: settings.model });
  const deleteAll = () => {
    app.removeAll();
    onClose();
  };
  return (
    <div class="settings-panel">
      <header>
        <h2 id="settings-title">Settings</h2>
        <IconButton label="Close" onClick={onClose}>
          <CloseIcon />
        </IconButton>
      </header>
      <div class="settings-body">
        <TextField
          kind="lines"
          label="System prompt"
          hint="Put before every conversation."
          value={settings.systemPrompt}
          onChange={(systemPrompt) => set({ systemPrompt })}
        />
        <h3>Sampling</h3>
        <SliderField
          label="Temperature"
          hint="At 0 the likeliest word always wins; higher is more varied."
          range={LIMITS.temperature}
          value={settings.temperature}
          onChange={(temperature) => set({ temperature })}
        />
        <SliderField
          label="Top-p"
          hint="Choose among the likeliest tokens that together have this probability."
          range={LIMITS.topP}
          value={settings.topP}
          onChange={(topP) => set({ topP })}
        />
        <NumberField
          label="Top-k"
          hint="Choose among this many tokens at most."
          placeholder="all"
          range={LIMITS.topK}
          value={settings.topK}
          onChange={(topK) => set({ topK })}
        />
        <NumberField
          label="Max tokens"
          hint="Longest answer."
          placeholder="server’s limit"
          range={LIMITS.maxTokens}
          value={settings.maxTokens}
          onChange={(maxTokens) => set({ maxTokens })}
        />
        <NumberField
          label="Seed"
          hint="The same seed gives the same answer again."
          placeholder="random"
          range={LIMITS.seed}
          value={settings.seed}
          onChange={(seed) => set({ seed })}
        />
        <button type="button" class="button" data-testid="settings-reset" onClick={reset}>
          Reset to defaults
        </button>
        <h3>Server</h3>
        <TextField
          kind="secret"
          label="API key"
          hint="Only where the server asks for one. Kept in this browser."
          placeholder="none"
          value={settings.apiKey}
          onChange={(apiKey) => set({ apiKey })}
        />
        <h3>Conversations</h3>
        <p class="hint">They are kept in this browser and nowhere else.</p>
        <button type="button" class="button danger" disabled={app.conversations.value.length === 0} onClick={deleteAll}>
          Delete all conversations
        </button>
        <h3>Keyboard</h3>
        <dl class="shortcuts">
          <dt>Enter</dt>
          <dd>Send</dd>
          <dt>Shift Enter</dt>
          <dd>New line</dd>
          <dt>Esc</dt>
          <dd>Stop the answer</dd>
          <dt>Ctrl K or ⌘ K</dt>
          <dd>New chat</dd>
        </dl>
      </div>
    </div>
  );
}
