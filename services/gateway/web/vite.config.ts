import { readFileSync } from "node:fs";
import type { Plugin } from "vite";
import { defineConfig } from "vitest/config";

// `npm run dev` serves the page and forwards its requests to a running gateway.
const gateway = process.env.GATEWAY_URL ?? "http://127.0.0.1:8000";

/** Copies the fonts' license into the build, because the license requires it. */
const fontLicenses: Plugin = {
  name: "font-licenses",
  generateBundle() {
    for (const font of ["figtree", "newsreader"]) {
      const source = readFileSync(new URL(`node_modules/@fontsource-variable/${font}/LICENSE`, import.meta.url));
      this.emitFile({ type: "asset", fileName: `assets/${font}-license.txt`, source });
    }
  },
};

export default defineConfig({
  // Relative addresses, so that the page also works behind a path prefix.
  base: "./",
  plugins: [fontLicenses],
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2022",
    // The page's Content-Security-Policy allows no data: fonts and no inline scripts.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rolldownOptions: { input: ["index.html", "report.html"] },
    license: { fileName: "assets/licenses.md" },
  },
  server: {
    proxy: { "/v1": gateway, "/readyz": gateway, "^/report/": gateway },
  },
  test: {
    include: ["test/**/*.test.{ts,tsx}"],
  },
});
