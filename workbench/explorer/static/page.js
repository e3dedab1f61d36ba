// The command-line page: the same module as in Jupyter, with the widget's messages carried by fetch.
import explorer from "./explorer.js?token=__TOKEN__";

const listeners = new Set();

async function post(command) {
  const response = await fetch("command", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Workbench-Token": "__TOKEN__" },
    body: JSON.stringify(command),
  });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

const model = {
  fragment: {
    read: () => location.hash.slice(1),
    write: (text) => history.replaceState(null, "", `#${text}`),
  },
  get: (name) => (name === "theme" ? new URLSearchParams(location.search).get("theme") || "auto" : undefined),
  on: (event, listener) => event === "msg:custom" && listeners.add(listener),
  off: (event, listener) => listeners.delete(listener),
  send: ({ id, command }) =>
    post(command)
      .then((view) => ({ id, view }))
      .catch((error) => ({ id, failure: `no answer from the workbench (${error.message.trim()}); is the command still running?` }))
      .then((message) => listeners.forEach((listener) => listener(message))),
};

explorer.render({ model, el: document.getElementById("explorer") });
