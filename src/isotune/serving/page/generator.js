"use strict";

let info, running, history = [];

function turn(role, text) {
  const item = element("div", undefined, role);
  const said = element("span", text, "said");
  item.append(element("span", role === "user" ? "You" : info.model, "who"), said);
  at("log").append(item);
  item.scrollIntoView({ block: "nearest" });
  return said;
}

function options() {
  const temperature = Number(at("temperature").value);
  const own = { max_completion_tokens: Number(at("max-tokens").value), temperature };
  return temperature > 0 ? { ...own, seed: Number(at("seed").value) } : own;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
  }
}

// The oldest exchanges are left out where the conversation is longer than the model, and that is shown.
async function open(signal) {
  for (;;) {
    try {
      const messages = history.map(({ role, content }) => ({ role, content }));
      return await ask("v1/chat/completions", { messages, stream: true, ...options() }, signal);
    } catch (error) {
      if (error.code !== "context_length_exceeded" || history.length < 3) throw error;
      history.splice(0, 2).forEach(({ said }) => said.parentElement.classList.add("left-out"));
      at("facts").textContent = "The oldest messages no longer fit, and the model does not read them.";
    }
  }
}

async function send(event) {
  event.preventDefault();
  const question = at("question").value;
  if (running || !question.trim()) return;
  showError(null);
  at("question").value = "";
  history.push({ role: "user", content: question, said: turn("user", question) });
  const own = history;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  const answer = { role: "assistant", content: "", said: turn("assistant", "") };
  let ended = false;
  try {
    for await (const chunk of events(await open(running.signal))) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      answer.content += choice.delta.content || "";
      answer.said.textContent = answer.content;
      ended = ended || choice.finish_reason !== null;
    }
    if (!ended) throw new Error("the answer broke off");
  } catch (error) {
    if (own === history) showError(error);
  }
  if (own !== history) return;  // another conversation has begun
  if (ended || answer.content) history.push(answer);
  else {  // the question is asked anew
    answer.said.parentElement.remove();
    history.pop().said.parentElement.remove();
    at("question").value = at("question").value || question;
  }
  restart();
  at("question").focus();
}

function stop() {
  if (running) running.abort();
}

function restart() {
  running = undefined;
  at("send").disabled = false;
  at("stop").disabled = true;
}

at("form").addEventListener("submit", send);
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", () => {
  stop();
  restart();
  history = [];
  at("log").replaceChildren();
  showError(null);
  at("question").focus();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});

showInfo((of) => `It is asked in ${of.form}.`).then((read) => {
  info = read;
  at("max-tokens").max = info.limits.new_tokens;
  at("max-tokens").value = Math.min(256, info.limits.new_tokens);
}).catch(showError);
