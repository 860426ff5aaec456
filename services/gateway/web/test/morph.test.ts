// @vitest-environment jsdom
import fc from "fast-check";
import { expect, test } from "vitest";
import { morph } from "../src/page/morph";
import { blockContent, blocks } from "../src/text/markdown";

function content(html: string): DocumentFragment {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content;
}

function element(html: string): HTMLElement {
  const root = document.createElement("div");
  root.append(content(html));
  document.body.append(root);
  return root;
}

const tree = fc.letrec<{ node: string }>((tie) => ({
  node: fc.oneof(
    { maxDepth: 3 },
    fc.constantFrom("a", "ab", "abc", "<br>"),
    fc
      .tuple(
        fc.constantFrom("p", "em", "pre"),
        fc.constantFrom("", ' class="x"', ' align="left"'),
        fc.array(tie("node")),
      )
      .map(([tag, attribute, inner]) => `<${tag}${attribute}>${inner.join("")}</${tag}>`),
  ),
})).node;

test("the result is what was wanted, whatever was there before", () => {
  fc.assert(
    fc.property(tree, tree, (before, after) => {
      const root = element(before);
      morph(root, content(after));
      expect(root.innerHTML).toBe(element(after).innerHTML);
      document.body.replaceChildren();
    }),
  );
});

test("while a block is written, a selection in it stays, and its elements do too", () => {
  const text = "Look:\n\n```python\nfor i in range(3):\n    print(i)\n```\n\nDone *now*, said I.";
  const root = document.createElement("div");
  document.body.append(root);
  const show = (end: number) => {
    const sources = blocks(text.slice(0, end));
    while (root.children.length < sources.length) root.append(document.createElement("section"));
    sources.forEach((source, index) => morph(root.children[index]!, blockContent(source)));
  };
  show(text.indexOf("range") + 5);
  const pre = root.querySelector("pre")!;
  const button = root.querySelector("button")!;
  const word = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT).nextNode() as Text;
  getSelection()!.setBaseAndExtent(word, 0, word, 3);
  for (let end = text.indexOf("range") + 6; end <= text.length; end += 1) show(end);
  expect(getSelection()!.toString()).toBe("for");
  expect(root.querySelector("pre")).toBe(pre);
  expect(root.querySelector("button")).toBe(button);
  expect(root.textContent).toContain("Done now, said I.");
});

test("a button that has just said Copied is left alone", () => {
  const root = element("<button data-copy>Copy</button><pre>a</pre>");
  root.querySelector("button")!.textContent = "Copied";
  morph(root, content("<button data-copy>Copy</button><pre>ab</pre>"));
  expect(root.textContent).toBe("Copiedab");
});
