// Attributes of elements whose content the page fills in itself, such as a button that has just said "Copied".
const OWN_CONTENT = ["data-copy", "data-tex"];

/**
 * Makes the content of `target` equal to the content of `wanted` with as few changes as possible. Nodes of the same
 * kind are kept and changed, so a selection, a scroll position, the focus and a pressed button survive while a text
 * grows. New nodes are moved out of `wanted`.
 */
export function morph(target: Node, wanted: Node): void {
  let old = target.firstChild;
  for (let next = wanted.firstChild; next;) {
    const following = next.nextSibling;
    if (!old) {
      target.appendChild(next);
    } else {
      const after: ChildNode | null = old.nextSibling;
      if (isSameKind(old, next)) adapt(old, next);
      else target.replaceChild(next, old);
      old = after;
    }
    next = following;
  }
  while (old) {
    const after: ChildNode | null = old.nextSibling;
    old.remove();
    old = after;
  }
}

/** Changes a text only from the first differing character on, so that a selection before this character stays. */
export function setText(node: CharacterData, text: string): void {
  const old = node.data;
  let same = 0;
  while (same < old.length && same < text.length && old[same] === text[same]) same += 1;
  if (same < old.length || same < text.length) node.replaceData(same, old.length - same, text.slice(same));
}

function isSameKind(old: Node, next: Node): boolean {
  if (old.nodeName !== next.nodeName) return false;
  if (!(old instanceof Element && next instanceof Element)) return true;
  return OWN_CONTENT.every((name) => old.getAttribute(name) === next.getAttribute(name));
}

function adapt(old: Node, next: Node): void {
  if (old instanceof CharacterData && next instanceof CharacterData) setText(old, next.data);
  if (!(old instanceof Element && next instanceof Element)) return;
  if (OWN_CONTENT.some((name) => next.hasAttribute(name))) return;
  for (const { name, value } of next.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const name of old.getAttributeNames()) if (!next.hasAttribute(name)) old.removeAttribute(name);
  morph(old, next);
}
