import { useSignal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import type { Conversation } from "../chat/conversation";
import { download, fileName, toJson, toMarkdown } from "../chat/export";
import { routeOf } from "../page/route";
import { isEnter } from "../page/textarea";
import { Menu } from "./Menu";
import { usePage } from "./context";

export function ConversationItem({ conversation }: { conversation: Conversation }) {
  const { app, layout } = usePage();
  const renaming = useSignal(false);
  const title = conversation.title.value;
  const active = app.activeId.value === conversation.id;
  const items = [
    { label: "Rename", run: () => (renaming.value = true) },
    {
      label: "Export as Markdown",
      run: () => download(fileName(title, "md"), "text/markdown", toMarkdown(conversation)),
    },
    {
      label: "Export as JSON",
      run: () => download(fileName(title, "json"), "application/json", toJson(conversation)),
    },
    { label: "Delete", danger: true, run: () => app.remove(conversation) },
  ];
  return (
    <li class="conversation-item" data-testid="conversation-item" data-active={active}>
      {renaming.value ? (
        <TitleField
          title={title}
          onDone={(changed) => {
            renaming.value = false;
            if (changed !== null) app.rename(conversation, changed);
          }}
        />
      ) : (
        <>
          <a
            href={routeOf(conversation.id)}
            title={title}
            aria-current={active ? "page" : undefined}
            onClick={() => layout.closeDrawer()}
          >
            {conversation.writing.value && <span class="pulse" role="img" aria-label="Answering" />}
            <span class="conversation-title" dir="auto">
              {title}
            </span>
          </a>
          <Menu label={`Actions for “${title}”`} items={items} />
        </>
      )}
    </li>
  );
}

/** A field for a conversation's title. `onDone` gets the new title, or null if the title does not change. */
function TitleField({ title, onDone }: { title: string; onDone: (title: string | null) => void }) {
  const field = useRef<HTMLInputElement>(null);
  useLayoutEffect(() => field.current!.select(), []);
  const finish = (keep: boolean) => {
    if (!field.current) return; // Enter and Escape remove the field, which blurs it a second time
    const text = field.current.value.trim();
    onDone(keep && text !== "" && text !== title ? text : null);
  };
  return (
    <input
      ref={field}
      class="title-field"
      data-testid="rename"
      aria-label="Title of the conversation"
      defaultValue={title}
      onBlur={() => finish(true)}
      onKeyDown={(event) => {
        if (isEnter(event)) finish(true);
        if (event.key === "Escape" && !event.isComposing) {
          event.stopPropagation();
          finish(false);
        }
      }}
    />
  );
}
