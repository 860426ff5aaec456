// Applies the theme that the person has chosen. This runs before the first paint, so that the page never begins in
// another theme. src/storage/theme.ts stores the chosen theme.
(function () {
  try {
    var theme = localStorage.getItem("nanochat.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch (error) {
    // The browser blocks the storage, so the system's theme is shown.
  }
})();
