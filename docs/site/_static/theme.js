// The explorers in the notebooks follow JupyterLab's theme. This gives them the site's in the same place.
function follow() {
  document.body.dataset.jpThemeLight = String(document.documentElement.dataset.theme !== "dark");
}
document.addEventListener("DOMContentLoaded", () => {
  for (const toggle of document.querySelectorAll(".toctree-toggle")) {
    toggle.parentElement.setAttribute("aria-label", "Pages of this section");  // the theme shows an arrow only
  }
  follow();
  new MutationObserver(follow).observe(document.documentElement, { attributeFilter: ["data-theme"] });
});
