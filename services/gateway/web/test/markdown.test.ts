// @vitest-environment jsdom
import { expect, test } from "vitest";
import { blockHtml, blocks } from "../src/text/markdown";

function render(text: string): HTMLElement {
  const root = document.createElement("div");
  root.innerHTML = blocks(text).map(blockHtml).join("");
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
      expect(["align", "class", "data-copy", "href", "rel", "start", "tabindex", "target", "type"]).toContain(name);
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

test("code is coloured where its language is known, and is the same text in any case", () => {
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
  expect(after.slice(0, 2).map((block) => block.raw)).toEqual(before.slice(0, 2).map((block) => block.raw));
});

test("headings stand below the page's own", () => {
  expect(render("# One\n\n###### Six").innerHTML).toBe("<h2>One</h2><h6>Six</h6>");
});
