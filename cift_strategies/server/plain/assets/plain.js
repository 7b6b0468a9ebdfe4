// Shows the newest frame as a table, and says when it is old.
const at = (id) => document.getElementById(id);
let arrived = 0;
let state = "connecting";

function show(frame) {
  arrived = performance.now();
  state = `${frame.node.mode}: ${frame.node.state}${frame.node.reason ? " (" + frame.node.reason + ")" : ""}, models ${frame.models.version || "none"}`;
  const positions = new Map(frame.positions.map((p) => [p.symbol, p]));
  at("rows").replaceChildren(...frame.instruments.map((x) => {
    const row = document.createElement("tr"), p = positions.get(x.symbol);
    const cells = [[x.symbol], [x.mid ?? "-", "n"], [x.spread_ticks ?? "-", "n"], [x.regime ?? "-"], [p.size, "n"], [p.net.toFixed(2), "n"], [x.decision]];
    for (const [text, kind] of cells) {
      const cell = row.insertCell();
      cell.textContent = text;
      if (kind) cell.className = kind;
    }
    return row;
  }));
  at("pnl").textContent = frame.pnl.map((p) => `net ${p.net.toFixed(2)} ${p.currency}, drawdown ${p.drawdown.toFixed(2)}`).join("; ");
}

function connect() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/v1/frames`, ["cift"]);
  socket.onmessage = (event) => show(JSON.parse(event.data));
  socket.onclose = () => setTimeout(connect, 1000);
}

setInterval(() => {
  const age = (performance.now() - arrived) / 1000;
  at("state").textContent = arrived && age < 2 ? state : `${state}; ${arrived ? "what you see is " + age.toFixed(0) + " s old" : "no news yet"}`;
}, 500);
connect();
