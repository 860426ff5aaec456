import { effect } from "@preact/signals";
import { render } from "preact";
import { Api } from "./api/api";
import { ChatApp } from "./chat/chat-app";
import { App } from "./components/App";
import { PageContext } from "./components/context";
import { Layout } from "./page/layout";
import { conversationIdOf, routeOf } from "./page/route";
import { browserStorage } from "./storage/browser";
import { ConversationStore } from "./storage/conversation-store";
import { storedSettings } from "./storage/settings";
import { storedTheme } from "./storage/theme";
import "./styles/index.css";

function main(): void {
  const storage = browserStorage();
  const settings = storedSettings(storage);
  const api = new Api(document.baseURI, () => settings.peek().apiKey);
  const store = new ConversationStore(storage);
  const app = new ChatApp(api, store, settings);
  app.start();
  store.watch(window, (id, stored) => app.adopt(id, stored));
  followAddress(app);
  effect(() => {
    document.title = app.active.value ? `${app.active.value.title.value} · nanochat` : "nanochat";
  });
  window.addEventListener("pagehide", () => app.saveRunning());
  window.addEventListener("online", () => void app.health.check());
  window.addEventListener("offline", () => void app.health.check());

  const page = { app, theme: storedTheme(storage, document.documentElement), layout: new Layout() };
  render(
    <PageContext.Provider value={page}>
      <App />
    </PageContext.Provider>,
    document.getElementById("app")!,
  );
}

/** Keeps the page's address and the open conversation in step in both directions. */
function followAddress(app: ChatApp): void {
  const read = () => {
    const id = conversationIdOf(location.hash);
    app.activeId.value = app.conversations.peek().some((conversation) => conversation.id === id) ? id : null;
  };
  read();
  window.addEventListener("popstate", read);
  effect(() => {
    const route = routeOf(app.activeId.value);
    if (conversationIdOf(location.hash) !== app.activeId.value) history.pushState(null, "", route);
  });
}

main();
