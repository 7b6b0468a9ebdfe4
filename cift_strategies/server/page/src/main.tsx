// The page: a head with the node's state and its commands, and the panels below.

import { Show, createEffect, createSignal, onMount, type JSX } from "solid-js";
import { render } from "solid-js/web";
import { Orders, Positions, Profit } from "./account";
import { clock, ms } from "./format";
import { Health, Latency } from "./health";
import { Book, Instruments, Price } from "./market";
import { Log, Votes, Weights } from "./models";
import { over } from "./parts";
import { age, asking, command, connect, link, old, setTrouble, state, trouble } from "./store";
import "./style.css";

type Theme = "auto" | "light" | "dark";
const THEMES: Theme[] = ["auto", "light", "dark"];

function Dialog(props: { open: boolean; label: string; close: () => void; children: JSX.Element }): JSX.Element {
  let box!: HTMLDialogElement;
  createEffect(() => (props.open ? box.showModal() : box.close()));
  return (
    <dialog ref={box} aria-label={props.label} onCancel={(e) => (e.preventDefault(), props.close())}>
      <Show when={props.open}>{props.children}</Show>
    </dialog>
  );
}

function Head(): JSX.Element {
  const [theme, setTheme] = createSignal<Theme>((localStorage.getItem("cift-theme") as Theme | null) ?? "auto");
  const [killing, setKilling] = createSignal(false);
  const [reason, setReason] = createSignal("");
  const [secret, setSecret] = createSignal("");
  const [busy, setBusy] = createSignal(false);
  const system = matchMedia("(prefers-color-scheme: dark)");
  const [dark, setDark] = createSignal(system.matches);
  system.addEventListener("change", () => setDark(system.matches));
  createEffect(() => {
    document.documentElement.dataset.theme = theme() !== "auto" ? theme() : dark() ? "dark" : "light";
    localStorage.setItem("cift-theme", theme());
  });
  const send = async (path: string, body?: unknown): Promise<void> => {
    setBusy(true);
    setTrouble(await command(path, body));
    setBusy(false);
  };
  createEffect(() => void (document.title = `${state.node.state} · CIFT`));
  const paused = (): boolean => ["paused", "killed"].includes(state.node.state);
  return (
    <header class="head">
      <h1>CIFT</h1>
      <p role="status" aria-live="polite" class="state">
        <b class={`badge ${state.node.state}`} data-test="state">
          {state.node.state}
        </b>
        <Show when={state.node.reason}> {state.node.reason}</Show>
      </p>
      <p class="soft">
        <Show when={!over()} fallback={`from ${clock(state.node.started)} to `}>
          {state.node.mode}
          <Show when={state.node.venue}> on {state.node.venue}</Show>
          <Show when={state.node.speed !== 1}>, {state.node.speed === 0 ? "unthrottled" : `${state.node.speed} times real pace`}</Show>
          {" · "}
        </Show>
        <time>{clock(state.ts)} UTC</time>
      </p>
      <div class="commands">
        <Show when={!over()}>
          <button disabled={busy()} onClick={() => void send(paused() ? "pipeline/start" : "pipeline/stop")}>
            {paused() ? "Resume" : "Pause"}
          </button>
          <button disabled={busy()} onClick={() => void send("models/reload")}>
            Reload models
          </button>
          <button disabled={busy()} class="danger" onClick={() => setKilling(true)}>
            Kill
          </button>
        </Show>
        <button
          aria-label={`colours: ${theme()}`}
          title={`colours: ${theme()}`}
          onClick={() => setTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]!)}
        >
          {{ auto: "◐", light: "☀", dark: "☾" }[theme()]}
        </button>
      </div>
      <Dialog open={killing()} label="kill" close={() => setKilling(false)}>
        <form
          onSubmit={(e) => {
            e.preventDefault();
            setKilling(false);
            void send("kill", { reason: reason() || "the page" });
          }}
        >
          <h2>Kill?</h2>
          <p>Every order is cancelled, every position is closed at the market, and nothing is entered until somebody resumes.</p>
          <label>
            Why (for the journal) <input value={reason()} onInput={(e) => setReason(e.currentTarget.value)} maxlength="200" />
          </label>
          <p class="choices">
            <button type="button" onClick={() => setKilling(false)} autofocus>
              No, go on
            </button>
            <button type="submit" class="danger">
              Kill
            </button>
          </p>
        </form>
      </Dialog>
      <Dialog open={asking() !== null} label="token" close={() => asking()?.(null)}>
        <form
          onSubmit={(e) => {
            e.preventDefault();
            asking()?.(secret().trim());
            setSecret("");
          }}
        >
          <h2>Token</h2>
          <p>Commands need the token that lies in the file “token” of the node’s state folder. It is kept until this tab is closed.</p>
          <label>
            Token <input type="password" autocomplete="off" value={secret()} onInput={(e) => setSecret(e.currentTarget.value)} autofocus />
          </label>
          <p class="choices">
            <button type="button" onClick={() => asking()?.(null)}>
              Cancel
            </button>
            <button type="submit" disabled={!secret().trim()}>
              Send
            </button>
          </p>
        </form>
      </Dialog>
    </header>
  );
}

function Notices(): JSX.Element {
  return (
    <div class="notices" aria-live="assertive">
      <Show when={link() === "connecting"}>
        <p>connecting to the node</p>
      </Show>
      <Show when={link() === "refused"}>
        <p class="bad">The server lets nobody in without the token: open this page once as /?token=…</p>
      </Show>
      <Show when={old() && link() !== "refused"}>
        <p class="bad" data-test="old">
          What is shown is {ms(age())} old: {link() === "live" ? "the node tells nothing new" : "the connection is lost, trying again"}
        </p>
      </Show>
      <Show when={trouble()}>
        <p class="bad">
          {trouble()} <button onClick={() => setTrouble("")}>Close</button>
        </p>
      </Show>
    </div>
  );
}

function App(): JSX.Element {
  onMount(connect);
  return (
    <>
      <Head />
      <Notices />
      <main classList={{ old: old(), over: over() }}>
        <Instruments />
        <Price />
        <Show when={!over()}>
          <Book />
        </Show>
        <Votes />
        <Weights />
        <Profit />
        <Positions />
        <Log />
        <Orders />
        <Latency />
        <Health />
      </main>
    </>
  );
}

render(() => <App />, document.getElementById("root")!);
