import { fromArchive, toArchive } from "../chat/archive";
import { download } from "../chat/export";
import { usableSettings } from "../storage/settings";
import { count } from "../text/format";
import { usePage } from "./context";
import { FilePicker } from "./FilePicker";

/** Writes all conversations and the settings, except the API key, to a file, and reads such files. */
export function Backup() {
  const { app } = usePage();
  const exportAll = () => {
    const all = app.conversations.peek().map((conversation) => conversation.toStored());
    const day = new Date().toISOString().slice(0, 10);
    download(`nanochat-${day}.json`, "application/json", toArchive(all, app.settings.peek()));
  };
  const importFile = async (file: File) => {
    try {
      const { conversations, settings } = fromArchive(await file.text());
      app.library.merge(conversations);
      const { apiKey } = app.settings.peek();
      app.settings.value = { ...app.settings.peek(), ...usableSettings(settings), apiKey };
      app.toast.value = { text: `Imported ${count(conversations.length, "conversation")}.` };
    } catch {
      app.toast.value = { text: `“${file.name}” is not an export of this page. Nothing was imported.` };
    }
  };
  return (
    <div class="backup">
      <button
        type="button"
        class="button"
        data-testid="export-all"
        disabled={app.conversations.value.length === 0}
        onClick={exportAll}
      >
        Export everything
      </button>
      <FilePicker
        text="Import…"
        label="File to import"
        testId="import"
        accept=".json,application/json"
        onFile={(file) => void importFile(file)}
      />
    </div>
  );
}
