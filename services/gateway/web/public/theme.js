// Runs before the first paint, so that the page never begins in another theme. src/storage/theme.ts writes the choice.
(function () {
  try {
    var theme = localStorage.getItem("nanochat.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch (error) {
    // Storage is blocked: the system's theme is shown.
  }
})();
