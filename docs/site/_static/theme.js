// The explorers in the notebooks follow JupyterLab's theme. This gives them the site's in the same place.
function follow() {
  document.body.dataset.jpThemeLight = String(document.documentElement.dataset.theme !== "dark");
}
document.addEventListener("DOMContentLoaded", () => {
  follow();
  new MutationObserver(follow).observe(document.documentElement, { attributeFilter: ["data-theme"] });
});
