// What the theme leaves out for screen readers and keyboards.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".caption[role=heading]").forEach((e) => e.setAttribute("aria-level", "2"));
  document.querySelectorAll(".sidebar-drawer").forEach((e) => e.setAttribute("aria-label", "pages"));
  document.querySelectorAll(".toc-drawer").forEach((e) => e.setAttribute("aria-label", "on this page"));
  document.querySelectorAll("pre, table, p:has(> img), .math-wrapper, .sidebar-scroll").forEach((e) => {
    if (e.scrollWidth > e.clientWidth) e.setAttribute("tabindex", "0");
  });
});
