import { DEFAULTS, LIMITS, type Settings } from "../storage/settings";
import { Backup } from "./Backup";
import { Dialog } from "./Dialog";
import { usePage } from "./context";
import { NumberField, SliderField, TextField } from "./fields";

export function SettingsDialog() {
  const { app } = usePage();
  return (
    <Dialog open={app.settingsOpen} title="Settings" testId="settings">
      <Panel />
    </Dialog>
  );
}

function Panel() {
  const { app } = usePage();
  const settings = app.settings.value;
  const set = (change: Partial<Settings>) => (app.settings.value = { ...app.settings.value, ...change });
  const reset = () => set({ ...DEFAULTS, apiKey: settings.apiKey, model: settings.model });
  const deleteAll = () => {
    app.removeAll();
    app.settingsOpen.value = false;
  };
  const showKeyboard = () => {
    app.settingsOpen.value = false;
    app.keyboardOpen.value = true;
  };
  return (
    <>
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
      <Backup />
      <button type="button" class="button danger" disabled={app.conversations.value.length === 0} onClick={deleteAll}>
        Delete all conversations
      </button>
      <h3>Keyboard</h3>
      <button type="button" class="button" onClick={showKeyboard}>
        All keys (?)
      </button>
    </>
  );
}
