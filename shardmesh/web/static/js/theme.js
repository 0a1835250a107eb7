// Sets the appearance before anything is painted; not a module, so that it runs at once.
(() => {
  try {
    const kept = localStorage.getItem("shardmesh.theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // Storage is forbidden: the system's appearance stays.
  }
})();
