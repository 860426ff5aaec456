// The build makes a separate script of this file, which the page loads with the first formula. KaTeX sets styles
// through the DOM, which the Content-Security-Policy allows; a style attribute in HTML would be blocked.
import "katex/dist/katex.min.css";
export { default as katex } from "katex";
