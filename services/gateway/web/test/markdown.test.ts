// @vitest-environment jsdom
import { expect, test } from "vitest";
import { morph } from "../src/page/morph";
import { blockContent, blocks } from "../src/text/markdown";
import { typeset } from "../src/text/math";

const ATTRIBUTES = "align class data-copy data-display data-tex href rel start tabindex target type".split(" ");

function render(text: string): HTMLElement {
  const root = document.createElement("div");
  root.append(...blocks(text).map(blockContent));
  return root;
}

test.each([
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "<svg><style>*{}</style><a xlink:href='javascript:alert(1)'>x</a></svg>",
  "text <b onclick='alert(1)' style='color:red'>bold</b>",
  "[link](javascript:alert(1))",
  "[link](data:text/html;base64,PHNjcmlwdD4=)",
  '[link](<https://a.example" onmouseover="alert(1)>)',
  "![picture](https://elsewhere.example/pixel.png)",
  "```js\n</code></pre><script>alert(1)</script>\n```",
  '```"><img/src=x\ncode\n```',
  "<iframe src='https://elsewhere.example'></iframe>",
  "<form action='/x'><input></form>",
])("%s does nothing", (text) => {
  const root = render(text);
  expect(root.querySelector("script, img, svg, style, iframe, form, input, object")).toBeNull();
  for (const element of root.querySelectorAll("*")) {
    for (const { name, value } of element.attributes) {
      expect(ATTRIBUTES).toContain(name);
      expect(value).not.toMatch(/^(javascript|data):/i);
    }
  }
});

test("HTML is shown as the text that it is", () => {
  expect(render("a <b>word</b> & more").textContent).toBe("a <b>word</b> & more\n");
});

test("a picture becomes a link, so that nothing is loaded from elsewhere", () => {
  const link = render("![a cat](https://example.org/cat.png)").querySelector("a")!;
  expect([link.textContent, link.getAttribute("href")]).toEqual(["a cat", "https://example.org/cat.png"]);
});

test("links open apart from the conversation", () => {
  const link = render("[a *page*](https://example.org/?a=1&b=2)").querySelector("a")!;
  expect(link.getAttribute("href")).toBe("https://example.org/?a=1&b=2");
  expect([link.target, link.rel]).toEqual(["_blank", "noopener noreferrer"]);
  expect(link.querySelector("em")!.textContent).toBe("page");
});

test("code is colored where its language is known, and is the same text in any case", () => {
  const code = "def f(a):\n    return a < 1 and '&amp;'";
  for (const language of ["python", "klingon", ""]) {
    const root = render(`\`\`\`${language}\n${code}\n\`\`\``);
    expect(root.querySelector("code")!.textContent).toBe(code);
    expect(root.querySelector(".hljs-keyword") !== null).toBe(language === "python");
    expect(root.querySelector("button[data-copy]")).not.toBeNull();
  }
});

test("code that is still being written is code already", () => {
  expect(render("Look:\n\n```python\nprint(").querySelector("code")!.textContent).toBe("print(");
});

test("a growing text changes only its last block", () => {
  const before = blocks("# Title\n\nFirst.\n\nSecond, gro");
  const after = blocks("# Title\n\nFirst.\n\nSecond, growing.\n\n- and");
  expect(after.slice(0, 2).map((block) => block.key)).toEqual(before.slice(0, 2).map((block) => block.key));
});

test("headings stand below the page's own", () => {
  expect(render("# One\n\n###### Six").innerHTML).toBe("<h2>One</h2><h6>Six</h6>");
});

test("a link to a reference becomes one as soon as the reference has come", () => {
  const text = "See [the page][1].\n\nMore.";
  expect(render(text).querySelector("a")).toBeNull();
  const complete = `${text}\n\n[1]: https://example.org/`;
  expect(render(complete).querySelector("a")!.getAttribute("href")).toBe("https://example.org/");
  expect(blocks(complete)[0]!.key).not.toBe(blocks(text)[0]!.key);
  expect(blocks(complete)[1]!.key).toBe(blocks(text)[1]!.key);
});

test.each([
  ["2*3*4 = 24", "2*3*4 = 24"],
  ["2**10 and 3**2", "2**10 and 3**2"],
  ["*2*3 is* six", "2*3 is six"],
  ["**5*5** and *x*", "5*5 and x"],
])("a star between digits is a star: %s", (text, shown) => {
  expect(render(text).textContent!.trim()).toBe(shown);
});

test("other stars still mean emphasis", () => {
  expect(render("*a* **b** 3 *c*").querySelectorAll("em, strong")).toHaveLength(3);
});

async function typesetText(text: string): Promise<HTMLElement> {
  const root = render(text);
  await typeset(root);
  return root;
}

test.each([
  [String.raw`It is \(x^2 + 1\).`, false],
  [String.raw`\[ \frac{1}{2} = 0.5 \]`, true],
  ["$$\n\\sqrt{2}\n- 1\n$$", true],
  [String.raw`Inline \[a+b\] too`, true],
])("%s is typeset", async (text, displayed) => {
  const root = await typesetText(text);
  expect(root.querySelector(".katex math")).not.toBeNull();
  expect(root.querySelector(".katex-display") !== null).toBe(displayed);
});

test.each([
  String.raw`an open \(x^2`,
  "a price of $5 and one of $6",
  String.raw`\(\notacommand{x}\)`,
  "`\\(x\\)` in code",
])("%s shows its source", async (text) => {
  const root = await typesetText(text);
  expect(root.querySelector(".katex")).toBeNull();
  expect(root.textContent!.trim()).toBe(text.replaceAll("`", "").replace("\\(x^2", "(x^2"));
});

test("a formula cannot load, link or style anything", async () => {
  const root = await typesetText(
    String.raw`\(\href{javascript:alert(1)}{x}\) \(\includegraphics{https://a.example/b.png}\) \(\htmlClass{a}{x}\)`,
  );
  expect(root.querySelector("a, img, .a")).toBeNull();
});

test("a formula that was typeset stays while the text after it grows", async () => {
  const root = document.createElement("div");
  const show = async (text: string) => {
    morph(root, blockContent(blocks(text)[0]!));
    await typeset(root);
  };
  await show(String.raw`So \(x^2\) is`);
  const set = root.querySelector(".katex");
  expect(set).not.toBeNull();
  await show(String.raw`So \(x^2\) is nine`);
  expect(root.querySelector(".katex")).toBe(set);
});
