import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { brotliCompressSync, gzipSync } from "node:zlib";
import type { Plugin } from "vite";
import { defineConfig } from "vitest/config";

// Address of the running gateway to which `npm run dev` forwards the requests of the page.
const gateway = process.env.GATEWAY_URL ?? "http://127.0.0.1:8000";

/** Copies the license of each font into the build, because the license requires it. */
const fontLicenses: Plugin = {
  name: "font-licenses",
  generateBundle() {
    for (const font of ["figtree", "newsreader"]) {
      const source = readFileSync(new URL(`node_modules/@fontsource-variable/${font}/LICENSE`, import.meta.url));
      this.emitFile({ type: "asset", fileName: `assets/${font}-license.txt`, source });
    }
  },
};

/** Keeps only the first of the three formats of each KaTeX font, which every browser that can show this page reads. */
const smallFontsOnly: Plugin = {
  name: "small-fonts-only",
  enforce: "pre",
  transform(code, id) {
    if (!id.includes("katex.min.css")) return null;
    return code.replace(/,\s*url\([^)]+\.(?:woff|ttf)\)\s*format\(["']?\w+["']?\)/g, "");
  },
};

/** Writes compressed copies beside each text file. The gateway sends a copy to browsers that accept its compression. */
const compressed: Plugin = {
  name: "compressed",
  apply: "build",
  closeBundle() {
    const folder = new URL("../static", import.meta.url).pathname;
    for (const name of readdirSync(folder, { recursive: true, encoding: "utf8" })) {
      if (!/\.(?:css|html|js|md|svg|txt)$/.test(name)) continue;
      const content = readFileSync(join(folder, name));
      writeFileSync(join(folder, `${name}.br`), brotliCompressSync(content));
      writeFileSync(join(folder, `${name}.gz`), gzipSync(content, { level: 9 }));
    }
  },
};

export default defineConfig({
  // The addresses are relative, so that the page also works behind a path prefix.
  base: "./",
  plugins: [fontLicenses, smallFontsOnly, compressed],
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2022",
    // Nothing is inlined, because the page's Content-Security-Policy allows no fonts in `data:` URLs and no inline
    // scripts.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rolldownOptions: { input: ["index.html", "report.html", "status.html"] },
    license: { fileName: "assets/licenses.md" },
  },
  server: {
    proxy: { "/v1": gateway, "/readyz": gateway, "/progress": gateway, "^/report/": gateway, "/admin": gateway },
  },
  test: {
    include: ["test/**/*.test.{ts,tsx}"],
  },
});
