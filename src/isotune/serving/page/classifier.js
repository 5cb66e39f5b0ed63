"use strict";

const PAUSE_MS = 150, SPOKEN_MS = 700, SHOWN_BARS = 12;
let info, running, timer, spoken;

const percent = (share) => `${(100 * share).toFixed(1)}%`;
const signed = (share) => `${share < 0 ? "−" : "+"}${Math.abs(share).toFixed(3)}`;

function body() {
  const own = { text: at("text").value };
  return info.pair ? { ...own, text_pair: at("text-pair").value } : own;
}

const isEmpty = () => !at("text").value.trim() && !(info.pair && at("text-pair").value.trim());

function changed() {
  clearTimeout(timer);
  at("words-section").hidden = at("errors-section").hidden = true;
  timer = setTimeout(predict, PAUSE_MS);
}

async function predict() {
  if (running) running.abort();
  showError(null);
  const empty = isEmpty();
  at("explain").disabled = empty;
  at("find").disabled = empty || !info.errors;
  at("empty").hidden = !empty;
  if (empty) {
    at("bars").replaceChildren();
    at("cut").textContent = "";
    return;
  }
  running = new AbortController();
  try {
    const answer = await (await ask("predict", body(), running.signal)).json();
    show(answer.predictions[0]);
  } catch (error) {
    showError(error);
  }
}

function show(prediction) {
  const shares = prediction.probabilities ? Object.entries(prediction.probabilities) : [["value", prediction.value]];
  const best = [...shares].sort((one, other) => other[1] - one[1]);
  // few classes stay where they are while one types; of many the likeliest are shown
  const shown = shares.length > SHOWN_BARS ? best.slice(0, SHOWN_BARS) : shares;
  const is = (name) => (prediction.labels ? prediction.labels.includes(name) : name === prediction.label);
  const items = [...at("bars").children];
  const same = items.length === shown.length && shown.every(([name], i) => items[i].dataset.name === name);
  if (!same) at("bars").replaceChildren(...shown.map(([name]) => bar(name, prediction.value === undefined)));
  [...at("bars").children].forEach((item, i) => {
    const [name, share] = shown[i];
    item.classList.toggle("first", is(name));
    item.querySelector(".share").textContent = prediction.value === undefined ? percent(share) : share.toPrecision(4);
    const fill = item.querySelector(".fill");
    if (fill) fill.style.width = percent(share);
  });
  const cut = prediction.tokens_read < prediction.tokens;
  at("cut").textContent = cut ? `The model reads ${prediction.tokens_read} of its ${prediction.tokens} tokens.` : "";
  clearTimeout(spoken);
  spoken = setTimeout(() => { at("said").textContent = inWords(prediction, best); }, SPOKEN_MS);
}

function inWords(prediction, best) {
  if (prediction.value !== undefined) return `Predicted value ${prediction.value.toPrecision(4)}`;
  if (prediction.labels) return `Predicted labels: ${prediction.labels.join(", ") || "none"}`;
  return `Predicted ${best[0][0]}, ${percent(best[0][1])}`;
}

function bar(name, isShare) {
  const item = element("li");
  item.dataset.name = name;
  const track = element("div", "", "track");
  if (isShare) track.append(element("div", "", "fill"));
  track.setAttribute("aria-hidden", "true");
  item.append(element("span", name, "name"), track, element("span", "", "share"));
  return item;
}

// the answer about the text as it stands; null where that has changed by the time the answer comes
async function askNow(path) {
  const asked = body();
  const found = await (await ask(path, asked)).json();
  return JSON.stringify(asked) === JSON.stringify(body()) ? found : null;
}

async function explain(event) {
  event.preventDefault();
  if (isEmpty()) return;
  at("explain").disabled = true;
  try {
    const found = await askNow("attributions");
    if (found) showWords(found);
  } catch (error) {
    showError(error);
  }
  at("explain").disabled = isEmpty();
}

function showWords(found) {
  const of = found.label === null ? "the value" : `the probability of ${found.label}`;
  at("method").textContent =
    `By ${found.method}: what each word adds to ${of}, from ${found.blank_output.toFixed(3)} for a blank text to ` +
    `${found.output.toFixed(3)}. Underlined words add to it, words with a dashed line take from it. ` +
    `Special tokens and rounding make up the rest.`;
  const largest = Math.max(1e-9, ...found.shares.map(Math.abs));
  const words = found.words.flatMap((word, i) => [shaded(word, found.shares[i], largest), " "]);
  at("words").replaceChildren(...words);
  const order = found.words.map((_, i) => i).sort((a, b) => Math.abs(found.shares[b]) - Math.abs(found.shares[a]));
  at("shares").replaceChildren(...order.map((i) => {
    const line = element("tr");
    line.append(element("td", found.words[i]), element("td", signed(found.shares[i]), "share"));
    return line;
  }));
  reveal("words-section", "words-title");
}

function shaded(word, share, largest) {
  const strength = Math.abs(share) / largest;
  const made = element("span", word, `word ${strength < 0.05 ? "" : share > 0 ? "for" : "against"}`);
  made.title = signed(share);
  made.style.backgroundColor = `rgba(var(--${share > 0 ? "for" : "against"}), ${(0.35 * strength).toFixed(3)})`;
  return made;
}

async function find() {
  at("find").disabled = true;
  try {
    const found = await askNow("similar");
    if (found) showErrors(found);
  } catch (error) {
    showError(error);
  }
  at("find").disabled = isEmpty() || !info.errors;
}

function showErrors(found) {
  at("errors-method").textContent = found.errors.length
    ? `Of ${info.errors} errors of the evaluation, by ${found.method}.`
    : `None of the ${info.errors} errors of the evaluation has a word of this text.`;
  at("errors").replaceChildren(...found.errors.map((error) => {
    const item = element("li");
    const sure = error.probability === undefined ? "" : ` (${percent(error.probability)})`;
    item.append(element("p", error.text, "quote"));
    item.append(element("p", `is ${error.actual}, was predicted ${error.predicted}${sure}`, "soft"));
    return item;
  }));
  reveal("errors-section", "errors-title");
}

function reveal(section, title) {
  at(section).hidden = false;
  at(title).focus();
}

showInfo((of) => `A classifier${of.labels.length ? ` of ${of.labels.length} ${of.task_type === "multi_label" ? "labels" : "classes"}` : ""}.`)
  .then((read) => {
    info = read;
    at("pair").hidden = !info.pair;
    if (info.pair) at("text-label").textContent = "First text";
    at("text").addEventListener("input", changed);
    at("text-pair").addEventListener("input", changed);
    at("form").addEventListener("submit", explain);
    at("find").addEventListener("click", find);
    predict();
  })
  .catch(showError);
