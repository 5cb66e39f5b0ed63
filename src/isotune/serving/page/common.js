"use strict";

// What both pages need: elements, requests to this server alone, and errors in words.

const at = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function refusal(response) {
  try {
    const error = (await response.json()).error;
    return Object.assign(new Error(error.message), { code: error.code });
  } catch {
    return new Error(`the server answers with status ${response.status}`);
  }
}

async function ask(path, body, signal) {
  const given = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await fetch(path, given);
  if (!response.ok) throw await refusal(response);
  return response;
}

function showError(error) {
  if (error && error.name === "AbortError") return;
  at("error").textContent = error ? (error instanceof TypeError ? "the server does not answer" : error.message) : "";
}

async function showInfo(words) {
  const info = await (await fetch("info")).json();
  at("model").textContent = info.model;
  document.title = `${info.model} - isotune`;
  const replayed = info.replayed ? `Replayed: ${info.replayed} to its evaluation.` : "Its evaluation was not replayed.";
  at("facts").textContent = `${words(info)} ${replayed}`;
  return info;
}
