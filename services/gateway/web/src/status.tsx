import { effect, signal } from "@preact/signals";
import { render } from "preact";
import { StatusPage } from "./components/StatusPage";
import { StatusApp } from "./status/status-app";
import { browserStorage, tabStorage } from "./storage/browser";
import { storedSettings } from "./storage/settings";
import "./styles/index.css";

const KEY = "nanochat.admin-key";

function main(): void {
  const storage = tabStorage();
  // If this tab has no key yet, the page tries the chat's key, which may have the scope admin. A key that the operator
  // enters is kept for this tab only.
  const key = signal(storage?.getItem(KEY) ?? storedSettings(browserStorage()).peek().apiKey);
  const app = new StatusApp(document.baseURI, key);
  effect(() => {
    if (app.status.value) storage?.setItem(KEY, key.peek());
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) app.stop();
    else void app.read();
  });
  void app.read();
  render(<StatusPage app={app} />, document.getElementById("app")!);
}

main();
