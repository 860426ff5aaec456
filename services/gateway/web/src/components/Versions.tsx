import type { Signal } from "@preact/signals";
import type { Conversation } from "../chat/conversation";
import type { Message } from "../chat/message";
import { IconButton } from "./IconButton";
import { usePage } from "./context";
import { NextIcon, PreviousIcon } from "./icons";

/** Buttons that switch between the versions of a message. With one version, there are no buttons. */
export function Versions({ conversation, message }: { conversation: Conversation; message: Signal<Message> }) {
  const { app } = usePage();
  const versions = conversation.versionsOf(message);
  if (versions.length < 2) return null;
  const index = versions.indexOf(message);
  const go = (step: number) => {
    const version = versions[index + step];
    if (version) app.show(conversation, version);
  };
  // A button that leads no further is aria-disabled instead of disabled, so that the focus stays on the button.
  return (
    <span class="versions" role="group" aria-label="Versions" data-testid="versions">
      <IconButton label="Earlier version" aria-disabled={index === 0} onClick={() => go(-1)}>
        <PreviousIcon />
      </IconButton>
      <span aria-live="polite">
        {index + 1}/{versions.length}
      </span>
      <IconButton label="Later version" aria-disabled={index === versions.length - 1} onClick={() => go(1)}>
        <NextIcon />
      </IconButton>
    </span>
  );
}
