// The page of the server: chosen files are uploaded, shown as strips of the frames that the model sees, and asked about.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { model: "", key: sessionStorage.getItem("key") || "", media: [], turns: [], reply: null };

class ServerError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers(more = {}) {
  return state.key ? { ...more, Authorization: `Bearer ${state.key}` } : more;
}

/** Send a request; resolves to the response, and rejects with the server's own message. */
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached. Is it still running?", "unreachable");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  const { message = `The server answered with status ${response.status}.`, code = "" } = found.error || {};
  if (response.status === 401) $("login").hidden = false;
  throw new ServerError(response.status, message, code);
}

/** Yield the JSON objects of a stream of server-sent events, up to its end. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError(0, "The answer broke off. Ask again.", "broken");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function say(text) {
  $("status").textContent = text;
}

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// videos and images ---------------------------------------------------------------------------------------------------

async function addFiles(files) {
  for (const file of files) {
    const item = { name: file.name, id: "", node: null };
    const note = element("span", { className: "quiet", textContent: "uploading" });
    const remove = element("button", { type: "button", className: "plain", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    const name = element("span", { className: "name", textContent: file.name, title: file.name });
    item.node = element("li", { className: "item" }, element("div", { className: "line" }, name, note, remove));
    remove.addEventListener("click", () => removeItem(item));
    $("media").append(item.node);
    state.media.push(item);
    try {
      await upload(item, file);
      note.textContent = "reading";
      await showStrip(item, note);
    } catch (error) {
      removeItem(item);
      say(`${file.name}: ${error.message}`);
    }
  }
}

async function upload(item, file) {
  const form = new FormData();
  form.append("purpose", "user_data");
  form.append("file", file, file.name);
  item.id = (await (await request("v1/files", { method: "POST", body: form })).json()).id;
  newConversation();
}

async function showStrip(item, note) {
  const strip = await (await request(`v1/files/${item.id}/frames`)).json();
  const list = element("ul", { className: "strip", tabIndex: 0 });
  list.setAttribute("aria-label", `Frames of ${item.name} that the model sees`);
  for (const frame of strip.data) {
    const time = frame.second === null ? "" : `${frame.second.toFixed(1)} s`;
    const image = element("img", { src: frame.image, alt: time ? `Frame at ${time}` : item.name, loading: "lazy" });
    list.append(element("li", {}, image, ...(time ? [element("span", { textContent: time, ariaHidden: "true" })] : [])));
  }
  item.node.append(list);
  const count = strip.data.length;
  note.textContent = strip.kind === "image" ? "image" : `${count} ${count === 1 ? "frame" : "frames"}`;
  say("");
}

function removeItem(item) {
  if (!state.media.includes(item)) return;
  state.media = state.media.filter((other) => other !== item);
  item.node.remove();
  if (item.id) {
    request(`v1/files/${item.id}`, { method: "DELETE" }).catch(() => {});
    newConversation();
  }
}

// conversation --------------------------------------------------------------------------------------------------------

/** Return the messages of a request: the media stand before the first question. */
function messages(media, turns) {
  return turns.map(({ role, text }, number) => {
    if (number > 0) return { role, content: text };
    const parts = media.filter((item) => item.id).map((item) => ({ type: "file", file: { file_id: item.id } }));
    return { role, content: [...parts, { type: "text", text }] };
  });
}

async function ask(question) {
  const asked = element("li", { className: "question", textContent: question });
  const node = element("li", { className: "answer growing" });
  $("talk").append(asked, node);
  const turns = [...state.turns, { role: "user", text: question }];
  const controller = new AbortController();
  state.reply = controller;
  setBusy(true);
  let text = "";
  try {
    const body = JSON.stringify({ model: state.model, messages: messages(state.media, turns), stream: true });
    const options = { method: "POST", body, signal: controller.signal, headers: { "Content-Type": "application/json" } };
    const response = await request("v1/chat/completions", options);
    for await (const event of readEvents(response.body)) {
      if (event.error) throw new ServerError(0, event.error.message, event.error.code);
      text += event.choices[0]?.delta.content || "";
      node.textContent = text;
      node.scrollIntoView({ block: "nearest" });
    }
    if (state.reply === controller) state.turns = [...turns, { role: "assistant", text }];
    say("");
  } catch (error) {
    if (error.name === "AbortError") {
      node.textContent = text || "(stopped)";
      if (text && state.reply === controller) state.turns = [...turns, { role: "assistant", text }];
    } else {
      node.textContent = text || "(no answer)";
      node.classList.add("failed");
      say(error.code === "file_not_found" ? "A file is no longer on the server. Remove it and add it again." : error.message);
    }
  } finally {
    node.classList.remove("growing");
    if (state.reply === controller) {
      state.reply = null;
      setBusy(false);
    }
  }
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("stop").hidden = !busy;
}

function newConversation() {
  const reply = state.reply;
  state.turns = [];
  state.reply = null;
  if (reply) reply.abort();
  $("talk").replaceChildren();
  setBusy(false);
}

// start ---------------------------------------------------------------------------------------------------------------

async function connect() {
  try {
    const models = await (await request("v1/models")).json();
    state.model = models.data[0].id;
    $("model").textContent = state.model;
    $("login").hidden = true;
    say("");
  } catch (error) {
    say(error.status === 401 && !state.key ? "" : error.message);
  }
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  sessionStorage.setItem("key", state.key);
  connect();
});
$("files").addEventListener("change", (event) => {
  const files = [...event.target.files];
  event.target.value = "";
  addFiles(files);
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || state.reply) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => state.reply?.abort());
$("clear").addEventListener("click", newConversation);
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" || event.relatedTarget === null) document.body.classList.remove("dragging");
  });
}
document.addEventListener("drop", (event) => addFiles([...event.dataTransfer.files]));
connect();
