// The list of runs is drawn by the server; the selection is kept here, because it is drawn again every few seconds.
const picked = new Set();
const rows = () => [...element.querySelectorAll("tr[data-name]")];
const paint = () => rows().forEach(row => {
  const box = row.querySelector("input");
  if (box) box.checked = picked.has(row.dataset.name);
});
element.addEventListener("change", event => {
  const row = event.target.closest("tr[data-name]");
  if (!row) return;
  picked[event.target.checked ? "add" : "delete"](row.dataset.name);
  trigger("input", {picked: [...picked]});
});
element.addEventListener("click", event => {
  const row = event.target.closest("tr[data-name]");
  if (!row || event.target.closest(".pick")) return;
  rows().forEach(other => other.classList.toggle("shown", other === row));
  trigger("select", {shown: row.dataset.name});
});
watch("value", paint);
