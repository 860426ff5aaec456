import { useId, useRef } from "preact/hooks";
import { MoreIcon } from "./icons";

export interface MenuItem {
  label: string;
  danger?: boolean;
  run: () => void;
}

// The menu's width, which must be the same as in sidebar.css. It is repeated here, because a hidden popover cannot be
// measured.
const WIDTH_PX = 200;
const ITEM_HEIGHT_PX = 36;
const GAP_PX = 6;

/** A button that opens a list of actions in the top layer; the browser closes it on Escape and on outside clicks. */
export function Menu({ label, items }: { label: string; items: readonly MenuItem[] }) {
  const id = useId();
  const button = useRef<HTMLButtonElement>(null);
  const list = useRef<HTMLDivElement>(null);

  const place = () => {
    const anchor = button.current!.getBoundingClientRect();
    const height = items.length * ITEM_HEIGHT_PX + 4 * GAP_PX;
    const below = anchor.bottom + height < window.innerHeight;
    const { style } = list.current!;
    style.left = `${Math.max(GAP_PX, anchor.right - WIDTH_PX)}px`;
    style.top = `${below ? anchor.bottom + GAP_PX : anchor.top - height}px`;
  };
  const move = (event: KeyboardEvent) => {
    const entries = Array.from(list.current!.querySelectorAll("button"));
    const current = entries.indexOf(document.activeElement as HTMLButtonElement);
    const next = { ArrowDown: current + 1, ArrowUp: current - 1, Home: 0, End: -1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    entries.at(next % entries.length)?.focus();
  };
  return (
    <>
      <button
        ref={button}
        type="button"
        class="icon-button menu-button"
        aria-label={label}
        aria-haspopup="menu"
        popovertarget={id}
      >
        <MoreIcon />
      </button>
      <div
        ref={list}
        id={id}
        popover="auto"
        class="menu"
        role="menu"
        aria-label={label}
        onBeforeToggle={(event) => event.newState === "open" && place()}
        onToggle={(event) => event.newState === "open" && list.current!.querySelector("button")?.focus()}
        onKeyDown={move}
      >
        {items.map((item) => (
          <button
            key={item.label}
            type="button"
            role="menuitem"
            tabIndex={-1}
            class={item.danger ? "danger" : ""}
            onClick={() => {
              list.current!.hidePopover();
              item.run();
            }}
          >
            {item.label}
          </button>
        ))}
      </div>
    </>
  );
}
