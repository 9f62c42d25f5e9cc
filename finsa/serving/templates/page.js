
"use strict";
const WORDS = {
  en: {
    skip: "Skip to the texts", title: "What does the text say?",
    lead: "Labels with probabilities for financial texts, from the model below. Texts stay on this server.",
    demonstration: "A demonstration: the answers come from a tiny embedded model or generated training texts. "
      + "Do not rely on them.",
    model: "Model", labels: "Labels", length: "Longest prompt", tokens: "tokens", texts: "Texts, one per line",
    hint: "Ctrl + Enter predicts. Texts that are too long are truncated, which the answer reports.", examples: "Try:",
    file: "Choose a CSV file", drop: "Or drop it here. UTF-8 or GB18030.", column: "Column with the texts",
    forget: "Remove the file", token: "Token", predict: "Predict", stop: "Stop", clear: "Clear", results: "Answers",
    token_hint: "This service requires one. It is kept until you close this page.",
    save: "Save as CSV", text: "Text", label: "Label", probabilities: "Probabilities", route: "Experts", time: "Time",
    docs: "Use from a program", cut: "truncated", abstain: "abstains: not sure enough", possible: "possible:", progress: "Progress",
    count: n => n === 1 ? "1 text" : `${n} texts`, none: "Enter a text first, or choose a file.",
    target: "Target", target_hint: "The company or aspect that the labels refer to, for all texts above.",
    target_column: "Column with the targets", no_target: "Enter the target of the texts first.",
    working: (done, all) => `${done} of ${all} texts …`,
    done: (n, ms) => `${n === 1 ? "1 text" : `${n} texts`} answered, ${ms} at the server.`,
    stopped: n => `Stopped after ${n} texts.`, shown: (n, all) => `The first ${n} of ${all} are shown; the CSV has all.`,
    away: "The service cannot be reached. Is it still running?",
    large: size => `This file is larger than ${size} MB; use stage=predict for it.`, empty: "This file has no rows.",
    rows: n => n === 1 ? "1 row" : `${n} rows`, unreadable: n => `, ${n} unreadable left out`, column_name: n => `column ${n}`, wrong: "Unexpected answer",
  },
  zh: {
    skip: "跳到文本", title: "这段文本说了什么？", lead: "为金融文本给出标签和概率。结果来自下面的模型，文本不会离开这台服务器。",
    demonstration: "仅供演示：答案来自内置的小模型或自动生成的训练文本，请勿据此做判断。",
    model: "模型", labels: "标签", length: "提示最长", tokens: "个词元", texts: "文本，每行一条",
    hint: "按 Ctrl + Enter 预测。过长的文本会被截断，结果中会注明。", examples: "试一试：",
    file: "选择 CSV 文件", drop: "或拖到这里。支持 UTF-8 和 GB18030。", column: "文本所在的列",
    forget: "移除文件", token: "令牌", predict: "预测", stop: "停止", clear: "清空", results: "结果",
    token_hint: "此服务需要令牌；关闭页面后不会保留。",
    save: "保存为 CSV", text: "文本", label: "标签", probabilities: "概率", route: "专家", time: "用时",
    docs: "如何在程序中调用", cut: "过长，已截断", abstain: "不作答：把握不足", possible: "可能的标签：", progress: "进度",
    count: n => `${n} 条文本`, none: "请先输入文本，或选择文件。",
    target: "目标", target_hint: "标签所针对的公司或方面，适用于上面的所有文本。",
    target_column: "目标所在的列", no_target: "请先输入这些文本的目标。",
    working: (done, all) => `已完成 ${done} / ${all} 条……`,
    done: (n, ms) => `已预测 ${n} 条文本，服务器用时 ${ms}。`,
    stopped: n => `已停止，完成 ${n} 条。`, shown: (n, all) => `仅显示前 ${n} 条（共 ${all} 条）；CSV 中有全部结果。`,
    away: "无法连接服务，它还在运行吗？",
    large: size => `文件超过 ${size} MB，请使用 stage=predict。`, empty: "此文件没有数据行。",
    rows: n => `${n} 行`, unreadable: n => `，另有 ${n} 行无法读取，已跳过`, column_name: n => `第 ${n} 列`, wrong: "无法理解服务的回答",
  },
};
const EXAMPLES = [  // rows of the sample's test split
  "沁谷制药对传闻未予置评，但已披露仿制药提价1.9%且客户接受度高。",
  "榕屿制药董事会席位从8名调整为15名，任期三年。",
  "今天这货把前面的利润全吐光了，被埋了😂",
  "湛石阴跌只是假象，后面还要大涨",
];
const TARGETS = /^(target|entity|company|aspect|实体|公司|目标|对象)$/i;
const SHOWN = 200, CHUNK = 64, PATIENCE = 5;
const $ = id => document.getElementById(id);
const { texts: mostTexts, bytes: mostBytes, file: mostFile } = document.body.dataset;
const limits = { texts: Number(mostTexts), bytes: Number(mostBytes), file: Number(mostFile) };
const state = { words: WORDS.en, table: null, opened: null, answers: [], stop: null, labels: [], route: false };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);  // strings become text, never markup
  return element;
}
const language = text => /[\u4e00-\u9fff]/.test(text) ? "zh-Hans" : "";
const percent = share => `${(100 * share).toFixed(1)} %`;
const time = ms => ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`;

// ---------------------------------------------------------------------------------------------- languages

function speak(name) {
  state.words = WORDS[name];
  document.documentElement.lang = name === "zh" ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = state.words[element.dataset.say];
  for (const button of document.querySelectorAll("[data-language]"))
    button.setAttribute("aria-pressed", String(button.dataset.language === name));
  $("progress").setAttribute("aria-label", state.words.progress);
  say(""); complain("");
  count();
  if (state.table) showColumns();
  if (state.answers.length) redraw();
}
const say = text => { $("status").textContent = text; };
const complain = text => { $("error").textContent = text; };

// ---------------------------------------------------------------------------------------------- texts

function texts() {  // {text}, or {text, target} for a model that needs a target
  const targeted = $("target"), cell = (row, column) => (row[Number($(column).value)] ?? "").trim();
  const all = state.table
    ? state.table.rows.map(row => ({ text: cell(row, "column"), ...(targeted && { target: cell(row, "target-column") }) }))
    : $("texts").value.split(/\r?\n/).map(line => ({ text: line.trim(), ...(targeted && { target: targeted.value.trim() }) }));
  return all.filter(one => one.text);
}
function count() {
  const number = texts().length;
  $("count").textContent = number && !state.table ? state.words.count(number) : "";
}
async function open(file) {
  forget(); complain("");
  const own = state.opened = {};  // a file that was replaced or removed may still be on its way
  try {
    if (file.size > limits.file) throw new Error(state.words.large(limits.file / 1e6));
    const form = /\.(csv|tsv|txt)$/i.exec(file.name)?.[1].toLowerCase() ?? "csv";
    const content = await post(`/file?form=${form}`, file, "application/octet-stream");
    if (state.opened !== own) return;
    if (!content.rows.length) throw new Error(state.words.empty);
    state.table = { name: file.name, ...content };
    showColumns();
  } catch (error) { if (state.opened === own) { forget(); complain(error.message); } }
}
function showColumns() {
  const { name, columns, rows, column, unreadable } = state.table, chosen = $("column").value || String(column);
  const target = $("target-column")?.value || String(Math.max(0, (columns ?? []).findIndex(one => TARGETS.test(one))));
  const options = () => rows[0].map((_, number) =>
    make("option", { value: String(number), textContent: columns?.[number] ?? state.words.column_name(number + 1) }));
  $("column").replaceChildren(...options());
  $("column").value = chosen;
  $("target-column")?.replaceChildren(...options());
  if ($("target-column")) $("target-column").value = target;
  $("file-count").textContent =
    `${name}: ${state.words.rows(rows.length)}${unreadable ? state.words.unreadable(unreadable) : ""}`;
  $("columns").hidden = false;
  $("texts").disabled = true;
  count();
}
function forget() {
  state.table = state.opened = null;
  $("file").value = ""; $("column").replaceChildren(); $("columns").hidden = true; $("texts").disabled = false;
  count();
}

// ---------------------------------------------------------------------------------------------- asking

function* chunks(all) {
  // A character is three bytes of UTF-8 at most, or six as an escape.
  let chunk = [], size = 0;
  for (const one of all) {
    const length = one.text.length + (one.target ?? "").length;
    if (chunk.length && (chunk.length >= Math.min(CHUNK, limits.texts) || size + 6 * length > limits.bytes / 2)) {
      yield chunk; chunk = []; size = 0;
    }
    chunk.push(one); size += 6 * length + 32;
  }
  if (chunk.length) yield chunk;
}
async function post(path, body, type, signal) {
  const headers = { "Content-Type": type };
  if ($("token")?.value) headers.Authorization = `Bearer ${$("token").value.trim()}`;
  for (let attempt = 1; ; attempt++) {
    let response;
    try {
      response = await fetch(path, { method: "POST", headers, body, signal });
    } catch (error) { throw error.name === "AbortError" ? error : new Error(state.words.away); }
    const content = await response.json().catch(() => ({}));
    if (response.ok) return content;
    if (response.status !== 503 || attempt === PATIENCE)
      throw new Error(content.error ?? `${state.words.wrong} (HTTP ${response.status})`);
    const seconds = Number(response.headers.get("Retry-After")) || attempt;
    await new Promise(resolve => setTimeout(resolve, 1000 * Math.min(seconds, 10)));
    signal?.throwIfAborted();
  }
}
async function ask(chunk, signal) {
  const many = $("target") ? { rows: chunk } : { texts: chunk.map(one => one.text) };
  const [path, body] = chunk.length === 1 ? ["/predict", chunk[0]] : ["/predict/batch", many];
  const content = await post(path, JSON.stringify(body), "application/json", signal);
  return { answers: content.predictions ?? [content], ms: content.time_ms };
}
async function predict() {
  const all = texts();
  complain(""); say("");
  if (!all.length) { complain(state.words.none); (state.table ? $("column") : $("texts")).focus(); return; }
  if (!state.table && all[0].target === "") { complain(state.words.no_target); $("target").focus(); return; }
  Object.assign(state, { answers: [], labels: [], route: false, stop: new AbortController() });
  const own = state.stop;  // a prediction that was stopped may still wait while the next one is under way
  busy(true); redraw();
  let ms = 0;
  try {
    for (const chunk of chunks(all)) {
      say(state.words.working(state.answers.length, all.length));
      const { answers, ms: taken } = await ask(chunk, own.signal);
      if (state.stop !== own) return;
      for (const answer of answers) answer.ms = taken / answers.length;
      ms += taken;
      add(answers);
      $("progress").value = state.answers.length / all.length;
    }
    say(state.words.done(all.length, time(ms)));
  } catch (error) {
    if (state.stop !== own) return;
    say(state.answers.length ? state.words.stopped(state.answers.length) : "");
    if (error.name !== "AbortError") complain(error.message);
  } finally { if (state.stop === own) busy(false); }
}
function busy(on) {
  $("predict").disabled = on;
  $("stop").hidden = !on;
  $("progress").hidden = !on;
  $("progress").value = 0;
  document.querySelector("main").setAttribute("aria-busy", String(on));
  if (!on && document.activeElement === document.body) $("predict").focus();
}

// ---------------------------------------------------------------------------------------------- answers

const color = label => `c${Math.max(0, state.labels.indexOf(label)) % 6}`;
const has = answer => answer.labels ?? [answer.prediction];
const tag = (label, rest = "") => make("span", { className: "tag", lang: language(label) },
  make("span", { className: `dot ${color(label)}` }), label + rest);
function bars(shares, paint) {
  return make("ul", { className: "bars" }, ...Object.entries(shares).map(([name, share], number) => {
    const fill = make("span", { className: `fill ${paint(name, number)}` });
    fill.style.width = percent(share).replace(" ", "");
    const track = make("span", { className: "track" }, fill);
    track.setAttribute("aria-hidden", "true");
    return make("li", {}, make("span", { lang: language(name), textContent: name }), track,
      make("span", { className: "share", textContent: percent(share) }));
  }));
}
function row(answer, number) {
  const text = make("td", { className: "text" }, make("div", { lang: language(answer.input), textContent: answer.input }));
  if (answer.target) text.append(make("div", { className: "soft", lang: language(answer.target), textContent: answer.target }));
  if (answer.truncated) text.append(make("span", { className: "cut", lang: document.documentElement.lang, textContent: state.words.cut }));
  const about = [answer.abstain && state.words.abstain, answer.label_set && `${state.words.possible} ${answer.label_set.join(", ")}`];
  const notes = about.filter(Boolean).map(content => make("div", { className: "soft", textContent: content }));
  const cells = [
    make("td", { className: "number", textContent: String(number) }), text, make("td", {}, ...has(answer).map(label => tag(label)), ...notes),
    make("td", { className: "wide" }, bars(answer.probs, color)),
  ];
  if (state.route) cells.push(make("td", { className: "wide" }, bars(answer.route ?? {}, (_, at) => `c${(at + 3) % 6}`)));
  cells.push(make("td", { className: "number", textContent: time(answer.ms) }));
  return make("tr", {}, ...cells);
}
function add(answers) {
  const from = state.answers.length;
  state.answers.push(...answers);
  if (from === 0) { redraw(); return; }
  $("rows").append(...answers.slice(0, Math.max(0, SHOWN - from)).map((answer, at) => row(answer, from + at + 1)));
  summarize();
}
function redraw() {
  const { answers } = state;
  state.labels = Object.keys(answers[0]?.probs ?? {});
  state.route = Boolean(answers[0]?.route);
  document.querySelector("th.route").hidden = !state.route;
  $("rows").replaceChildren(...answers.slice(0, SHOWN).map((answer, at) => row(answer, at + 1)));
  $("results").hidden = !answers.length;
  summarize();
}
function summarize() {
  const { answers } = state;
  const counts = state.labels.map(label => [label, answers.filter(answer => has(answer).includes(label)).length]);
  $("summary").replaceChildren(...(answers.length > 1 ? counts.map(([label, number]) => tag(label, ` ${number}`)) : []));
  $("more").textContent = answers.length > SHOWN ? state.words.shown(SHOWN, answers.length) : "";
}
function save() {
  // A cell that a spreadsheet would run as a formula gets an apostrophe in front.
  const cell = value => `"${String(value).replace(/^(?!-?[\d.]+$)[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
  const targeted = $("target") ? ["target"] : [];
  const decided = ["abstain", "label_set"].filter(name => name in (state.answers[0] ?? {}));
  const head = ["text", ...targeted, "number" in (state.answers[0] ?? {}) ? "number" : "label", ...state.labels.map(label => `p_${label}`), "truncated", ...decided];
  // A set of labels is written as a list, as by stage=predict, which reads it back.
  const label = answer => answer.number ?? (answer.labels ? JSON.stringify(answer.labels) : answer.prediction);
  const lines = state.answers.map(answer =>
    [answer.input, ...targeted.map(() => answer.target), label(answer), ...state.labels.map(label => answer.probs[label]), answer.truncated,
      ...decided.map(name => JSON.stringify(answer[name]))]);
  const content = "\ufeff" + [head, ...lines].map(line => line.map(cell).join(",")).join("\r\n") + "\r\n";
  const url = URL.createObjectURL(new Blob([content], { type: "text/csv" }));
  make("a", { href: url, download: "finsa.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---------------------------------------------------------------------------------------------- what the user does

$("form").addEventListener("submit", event => { event.preventDefault(); predict(); });
$("texts").addEventListener("input", count);
$("texts").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("predict").disabled) { event.preventDefault(); predict(); }
});
$("stop").addEventListener("click", () => { state.stop?.abort(); $("predict").disabled = false; $("predict").focus(); });
$("clear").addEventListener("click", () => {
  state.stop?.abort(); forget(); state.answers = []; $("texts").value = "";
  say(""); complain(""); count(); redraw(); $("texts").focus();
});
$("save").addEventListener("click", save);
$("forget").addEventListener("click", () => { forget(); $("file").focus(); });
$("column").addEventListener("change", count);
$("file").addEventListener("change", () => { if ($("file").files.length) open($("file").files[0]); });
for (const button of document.querySelectorAll("[data-language]"))
  button.addEventListener("click", () => speak(button.dataset.language));
for (const name of ["dragover", "dragleave", "drop"])
  document.addEventListener(name, event => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
$("examples").append(...EXAMPLES.map(text => {
  const button = make("button", { type: "button", className: "example", lang: "zh-Hans", textContent: text });
  button.addEventListener("click", () => {
    if (state.table) forget();
    const before = $("texts").value.trimEnd();
    $("texts").value = before ? `${before}\n${text}` : text;
    count(); $("texts").focus();
  });
  return button;
}));
speak(navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
