// The frame around the views: appearance, sections, what a phone shows.

import { announce, byId } from "./dom.js";

const THEMES = ["system", "light", "dark"];
const NAMES = { system: "as the system", light: "light", dark: "dark" };

function kept() {
  try {
    return localStorage.getItem("shardmesh.theme") ?? "system";
  } catch {
    return "system";
  }
}

/** The button goes through: as the system, light, dark. */
export function themeSwitch() {
  const button = byId("theme");
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-label", `Appearance: ${NAMES[theme]}`);
    button.title = `Appearance: ${NAMES[theme]}`;
    dispatchEvent(new Event("themechange"));
  };
  let theme = THEMES.includes(kept()) ? kept() : "system";
  show(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem("shardmesh.theme", theme);
    } catch {
      // Then it holds for this visit only.
    }
    show(theme);
    announce(`Appearance: ${NAMES[theme]}`);
  });
}

/** Links of the header scroll on a wide screen and switch views on a narrow one. */
export function followSections() {
  const links = [...document.querySelectorAll("[data-view-link]")];
  const go = (link) => {
    const view = link.dataset.viewLink;
    document.body.dataset.view = view;
    for (const each of links) {
      if (each.dataset.viewLink === view) each.setAttribute("aria-current", "page");
      else each.removeAttribute("aria-current");
    }
    const target = document.querySelector(link.getAttribute("href"));
    target?.scrollIntoView({ block: "start" });
    target?.focus({ preventScroll: true });
  };
  for (const link of links) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      go(link);
      history.replaceState(null, "", link.getAttribute("href"));
    });
  }
  const wanted = links.find((link) => link.getAttribute("href") === location.hash && link.offsetParent);
  if (wanted) go(wanted);
  else links[0].setAttribute("aria-current", "page");
}
