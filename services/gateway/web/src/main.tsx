import { computed, effect, type Signal } from "@preact/signals";
import { render } from "preact";
import { Api } from "./api/api";
import { ChatApp } from "./chat/chat-app";
import { App } from "./components/App";
import { PageContext } from "./components/context";
import { Lessons } from "./lessons/watch";
import { Layout } from "./page/layout";
import { conversationIdOf, isKey, keyOf, routeOf } from "./page/route";
import { browserStorage, tabStorage } from "./storage/browser";
import { ConversationStore } from "./storage/conversation-store";
import { Drafts } from "./storage/drafts";
import { storedSettings, type Settings } from "./storage/settings";
import { browserLinks } from "./storage/tabs";
import { storedTheme } from "./storage/theme";
import { TrainingWatch } from "./training/watch";
import "./styles/index.css";

function main(): void {
  const storage = browserStorage();
  const settings = storedSettings(storage);
  takeKey(settings);
  const api = new Api(document.baseURI, () => settings.peek().apiKey);
  const store = new ConversationStore(storage);
  const app = new ChatApp(api, store, settings, browserLinks());
  app.start();
  store.watch(window, {
    header: (header) => app.library.adoptHeader(header),
    message: (conversation, message) => app.library.adoptMessage(conversation, message),
  });
  followAddress(app, settings);
  effect(() => {
    document.title = app.active.value ? `${app.active.value.title.value} · nanochat` : "nanochat";
  });
  // Unfinished answers are stored in beforeunload already, because Firefox loses most of what a page stores in pagehide
  // while its tab closes. Nothing more is done in beforeunload, because the person may still stay on the page.
  window.addEventListener("beforeunload", () => app.library.saveUnfinished());
  window.addEventListener("pagehide", () => app.library.close());
  window.addEventListener("online", () => void app.health.check());
  window.addEventListener("offline", () => void app.health.check());

  const hidden = () => document.hidden;
  const training = new TrainingWatch(document.baseURI, {
    hidden,
    apiKey: () => settings.peek().apiKey,
    waiting: () => app.health.state.peek() !== "ready",
    onServed: () => void app.health.check(),
  });
  void training.check();
  const lessons = new Lessons(api, {
    hidden,
    hasKey: () => isKey(settings.peek().apiKey),
    onServed: () => void app.health.check(),
  });
  document.addEventListener("visibilitychange", () => {
    if (hidden()) return;
    void training.check();
    void lessons.check();
  });
  const key = computed(() => settings.value.apiKey);
  effect(() => {
    // The lessons are requested after each change of the key or of the server's state: a new key may have other rights,
    // and a server that has become ready may offer lessons.
    if (key.value !== null && app.health.state.value === "ready") void lessons.check();
  });
  const page = {
    app,
    training,
    lessons,
    theme: storedTheme(storage, document.documentElement),
    layout: new Layout(),
    drafts: new Drafts(tabStorage()),
  };
  render(
    <PageContext.Provider value={page}>
      <App />
    </PageContext.Provider>,
    document.getElementById("app")!,
  );
}

/** Moves an API key from the address to the settings, so that it stays neither in the address nor in the history. */
function takeKey(settings: Signal<Settings>): void {
  const apiKey = keyOf(location.hash);
  if (apiKey === null) return;
  settings.value = { ...settings.peek(), apiKey };
  history.replaceState(null, "", routeOf(null));
}

/** Writes the open conversation into the page's address, and opens the conversation that a new address names. */
function followAddress(app: ChatApp, settings: Signal<Settings>): void {
  const read = () => {
    takeKey(settings); // called here too, because a link with a key, opened in this tab, does not load the page again
    // The address may name a conversation that another tab has not announced yet, so an unknown id is accepted.
    app.activeId.value = conversationIdOf(location.hash);
  };
  read();
  window.addEventListener("popstate", read);
  effect(() => {
    const route = routeOf(app.activeId.value);
    if (conversationIdOf(location.hash) !== app.activeId.value) history.pushState(null, "", route);
  });
}

main();
