import type { ComponentChildren, JSX } from "preact";

type Props = Omit<JSX.IntrinsicElements["button"], "children" | "label"> & {
  /** What the button does: its accessible name and its tooltip. */
  label: string;
  children: ComponentChildren;
};

export function IconButton({ label, children, class: className = "", ...rest }: Props) {
  return (
    <button type="button" class={`icon-button ${className as string}`} aria-label={label} title={label} {...rest}>
      {children}
    </button>
  );
}
