import { useComputed, useSignal } from "@preact/signals";
import type { Conversation } from "../chat/conversation";
import { period } from "../text/format";
import { ConversationItem } from "./ConversationItem";
import { IconButton } from "./IconButton";
import { ThemeSwitch } from "./ThemeSwitch";
import { usePage } from "./context";
import { PlusIcon, SidebarIcon } from "./icons";

const FEW = 7; // up to this number of conversations, the list needs no search field

export function Sidebar() {
  const { app, layout } = usePage();
  const query = useSignal("");
  const groups = useComputed(() => byPeriod(found(app.conversations.value, query.value)));
  const total = app.conversations.value.length;
  const open = layout.sidebarOpen.value;
  const newChat = () => {
    app.newChat();
    layout.closeDrawer();
  };
  return (
    <nav class="sidebar" id="sidebar" aria-label="Conversations" inert={!open}>
      <div class="sidebar-head">
        <span class="wordmark">nanochat</span>
        <IconButton label="Hide the list" aria-controls="sidebar" onClick={() => layout.toggleSidebar()}>
          <SidebarIcon />
        </IconButton>
      </div>
      <button
        type="button"
        class="new-chat"
        data-testid="new-chat"
        aria-keyshortcuts="Control+K Meta+K"
        onClick={newChat}
      >
        <PlusIcon />
        <span>New chat</span>
        <kbd>{shortcut()}</kbd>
      </button>
      {total > FEW && (
        <input
          type="search"
          class="search"
          placeholder="Search"
          aria-label="Search conversations"
          value={query.value}
          onInput={(event) => (query.value = event.currentTarget.value)}
        />
      )}
      <div class="conversation-list">
        {groups.value.map(([name, conversations]) => (
          <section key={name} aria-label={name}>
            <h2>{name}</h2>
            <ul>
              {conversations.map((conversation) => (
                <ConversationItem key={conversation.id} conversation={conversation} />
              ))}
            </ul>
          </section>
        ))}
        {groups.value.length === 0 && (
          <p class="faint list-note">{total > 0 ? "Nothing found." : "Your conversations will be listed here."}</p>
        )}
      </div>
      <ThemeSwitch />
    </nav>
  );
}

/** The conversations whose title or messages contain the text `query`, newest first. */
function found(conversations: readonly Conversation[], query: string): Conversation[] {
  const needle = query.trim().toLowerCase();
  const matches = (text: string) => text.toLowerCase().includes(needle);
  return conversations
    .filter(
      (conversation) =>
        needle === "" ||
        matches(conversation.title.value) ||
        conversation.snapshot().some((message) => matches(message.content)),
    )
    .sort((a, b) => b.updatedAt.value - a.updatedAt.value);
}

function byPeriod(conversations: readonly Conversation[]): [string, Conversation[]][] {
  const groups = new Map<string, Conversation[]>();
  for (const conversation of conversations) {
    const name = period(conversation.updatedAt.value);
    groups.set(name, [...(groups.get(name) ?? []), conversation]);
  }
  return [...groups];
}

function shortcut(): string {
  return /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘K" : "Ctrl K";
}
