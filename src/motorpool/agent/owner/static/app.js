// The owner's page. It shows what the car says, and nothing that it cannot know: without the car it says so.
import { canSign, loadKey, makeKey, publicOf, signGrant } from "/key.js";
import { clock, fillForm, readForm, weekdays } from "/form.js";

const LAST = "last";
const POLL_MS = 2000;
const PATIENCE_MS = 4000;
const UNREACHED = "Your phone does not reach the car: take it that the car has not heard you. Nothing is sent later by itself. "
  + "To stop the car's computer now: unlock the car, open a door or pull the charging cable. It stops at once.";
const $ = (id) => document.getElementById(id);
let key = null;
let papers = null;
let state = null;
let entries = 20;
let reached = false;

class Refused extends Error {}

// What is asked may be asked twice without harm, so a connection that the car has just closed is no failure yet.
async function ask(path, body) {
  try {
    return await askOnce(path, body);
  } catch (error) {
    if (error instanceof Refused || error.name === "TimeoutError") throw error;
    return askOnce(path, body);
  }
}

async function askOnce(path, body) {
  const options = { signal: AbortSignal.timeout(PATIENCE_MS) };
  if (body !== undefined) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json", "X-Motorpool-Owner": "1" };
    options.body = typeof body === "string" ? body : JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const told = await answer.json();
  if (!answer.ok) throw new Refused(told.error.message);
  return told;
}

function when(ms) {
  return new Intl.DateTimeFormat(undefined, { weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" }).format(ms);
}

function tell(words) {
  $("told").textContent = words;
  $("told").hidden = !words;
}

function item(words) {
  return Object.assign(document.createElement("li"), { textContent: words });
}

function showState() {
  document.body.dataset.state = state.working ? "working" : state.allowed ? "ready" : "resting";
  document.body.dataset.reached = String(reached);
  if ($("now").textContent !== state.sentence) $("now").textContent = state.sentence; // it is read out when it changes
  const facts = [];
  if (state.soc_pct !== null) facts.push(`Battery ${Math.round(state.soc_pct)} %`);
  if (state.plugged !== null) facts.push(state.plugged ? "plugged in" : "not plugged in");
  if (state.allowed) facts.push(`up to ${state.watts_w} W`);
  $("facts").textContent = facts.join(", ");
  const said = state.acts.words ?? "";
  $("said").textContent = said && `${said[0].toUpperCase()}${said.slice(1)}.`;
  $("said").hidden = !said;
  const more = state.why.filter((reason, at) => at > 0 || reason.detail);
  $("why").replaceChildren(...more.map((reason) => item(reason.detail ? `${reason.words}: ${reason.detail}` : reason.words)));
  $("resume").hidden = !said;
  $("need").hidden = state.acts.need_car;
  $("pause").hidden = Boolean(state.acts.paused_until_ms) || state.acts.need_car;
  showConsent();
}

function limitsInWords(view) {
  const words = [`Power up to ${view.max_watts_w} W`, `No work below ${view.floor_pct} % charge`];
  if (view.ready_by_minute !== null) words.push(`${view.target_pct} % by ${clock(view.ready_by_minute)} every day`);
  for (const wish of view.schedule) words.push(`${wish.target_pct} % by ${clock(wish.minute)}, ${weekdays(wish.weekdays)}`);
  for (const quiet of view.quiet) words.push(`No work from ${clock(quiet.from_minute)} to ${clock(quiet.to_minute)}, ${weekdays(quiet.weekdays)}`);
  if (view.share_while_charging) words.push("May take a part of the charging power");
  words.push(view.battery_watts_w ? `Without the cable up to ${view.battery_watts_w} W, not below ${view.battery_floor_pct} %` : "Never without the cable");
  words.push(`At most ${view.limits.compute_h_week} hours a week`, `Until ${new Date(view.expires_ms).toLocaleDateString()}`);
  return words;
}

function showConsent() {
  const view = state.consent;
  const holds = view.refusal === null;
  const mine = key !== null && papers !== null && papers.public === key.public;
  const free = papers !== null && papers.public === null;
  const suspended = state.why.some((reason) => reason.code === "consent_suspended");
  $("consent-words").textContent = holds
    ? "You allow this car to work for others while it is parked:"
    : "You do not allow this car to work for others. It never does so without you.";
  $("limits").replaceChildren(...(holds ? limitsInWords(view) : []).map(item));
  $("withdraw").hidden = !holds;
  $("allow").hidden = holds || !(mine || free) || !canSign() || !$("form").hidden;
  $("change").hidden = !holds || !mine || !$("form").hidden;
  $("confirm").hidden = !(holds && mine && suspended);
  $("key-words").textContent = keyInWords(mine, free);
}

function keyInWords(mine, free) {
  if (papers === null) return "";
  if (mine) return "The key with which you allow it is on this phone and cannot be copied from it.";
  if (!canSign()) return "This browser can keep no key here, since the page is not served over HTTPS. You can stop and take back; to allow, use the car's command line.";
  if (free) return "The first time you allow it, a key is made on this phone. From then on only this phone can allow more.";
  if (papers.key_in_car) return "The key with which you allow it lies in the car: sign on the car's command line. You can stop and take back from here.";
  return "The key with which you allow it is on another phone. You can stop and take back from here.";
}

function money(micro) {
  return micro === null ? "not known" : (micro / 1e6).toFixed(Math.abs(micro) < 1e6 && micro !== 0 ? 4 : 2);
}

function showWeeks(weeks) {
  const rows = weeks.filter((week, at) => at === 0 || week.allowed_ms || week.pay_micro).map((week) => {
    const row = document.createElement("tr");
    const head = Object.assign(document.createElement("th"), { scope: "row" });
    head.textContent = new Date(week.from_ms).toLocaleDateString(undefined, { day: "numeric", month: "short" });
    row.append(head, ...[week.pay_micro, week.electricity_micro, week.wear_micro, week.net_micro].map((micro) =>
      Object.assign(document.createElement("td"), { textContent: money(micro) })));
    return row;
  });
  $("weeks").replaceChildren(...rows);
  const week = weeks[0];
  const hours = (week.working_ms / 3600000).toFixed(1);
  const how = week.measured_mwh >= week.energy_mwh ? "measured" : week.measured_mwh ? "partly measured" : "estimated";
  $("week-words").textContent = `This week: ${hours} hours of work, ${week.requests} requests, ${(week.energy_mwh / 1e6).toFixed(2)} kWh (${how}).`;
}

function showLog(list) {
  $("log").replaceChildren(...list.toReversed().map((entry) => item(entry.words)));
  $("more").hidden = list.length < entries || entries >= 500;
}

function showUnreached() {
  reached = false;
  document.body.dataset.reached = "false";
  $("offline").textContent = state
    ? `Your phone does not reach the car. This is how it was on ${when(state.at)}.`
    : "Your phone does not reach the car. Are you in its Wi-Fi?";
  $("offline").hidden = false;
}

function keep(more) {
  const last = { ...JSON.parse(localStorage.getItem(LAST) ?? "{}"), ...more };
  localStorage.setItem(LAST, JSON.stringify(last));
}

function take(found) {
  reached = true;
  state = { ...found, at: Date.now() };
  $("offline").hidden = true;
  keep({ state });
  showState();
}

async function look() {
  try {
    const back = !reached;
    take(await ask("/api/state"));
    if (back) await lookWhole();
  } catch (error) {
    if (error instanceof Refused) {
      $("now").textContent = "This phone is not paired with the car any more.";
      tell(error.message);
      localStorage.removeItem(LAST);
    } else {
      showUnreached();
    }
  }
}

async function lookWhole() {
  const [found, statement, log] = await Promise.all([
    ask("/api/papers"), ask("/api/statement"), ask(`/api/log?limit=${entries}`),
  ]);
  papers = found;
  showWeeks(statement.weeks);
  showLog(log.entries);
  keep({ weeks: statement.weeks, entries: log.entries });
  showState();
}

async function act(body, done) {
  tell("");
  try {
    take(await ask("/api/act", body));
    tell(done);
    await lookWhole();
  } catch (error) {
    tell(error instanceof Refused ? error.message : UNREACHED);
    if (!(error instanceof Refused)) showUnreached();
  }
}

async function sign(limits, expiresMs) {
  tell("");
  try {
    papers = await ask("/api/papers");
    if (papers.public === null) {
      const pair = key?.pair ?? await makeKey();
      key = { pair, public: await publicOf(pair) };
      await ask("/api/enrol", { public: key.public });
    }
    take(await ask("/api/consent", await signGrant(key.pair, papers, limits, expiresMs)));
    $("form").hidden = true;
    await lookWhole();
    tell("Signed. The car works when it is parked and everything else allows it.");
  } catch (error) {
    const words = error instanceof Refused ? error.message : error.name === "NotSupportedError"
      ? "This browser knows no Ed25519 keys: update it, or use another one." : UNREACHED;
    tell(words);
  }
}

function openForm() {
  if (!papers) return;
  fillForm($("form"), papers.grant, papers.now_ms);
  $("form").hidden = false;
  showConsent();
  $("form").querySelector("input").focus();
}

function listen() {
  $("need").addEventListener("click", () => act({ act: "need_car" }, "The car's computer is yours. It rests until you have driven, or say go on."));
  $("pause").addEventListener("click", () => act({ act: "pause", minutes: 60 }, "The car rests for an hour."));
  $("resume").addEventListener("click", () => act({ act: "resume" }, "Your pause is over."));
  $("withdraw").addEventListener("click", () => act({ act: "withdraw" }, "Taken back. The car does not work for others until you sign again."));
  $("allow").addEventListener("click", openForm);
  $("change").addEventListener("click", openForm);
  $("confirm").addEventListener("click", () => sign(papers.grant.limits, papers.grant.expires_ms));
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const asked = readForm($("form"), papers.now_ms);
    sign(asked.limits, asked.expiresMs);
  });
  $("more").addEventListener("click", async () => {
    entries = Math.min(500, entries + 80);
    try { showLog((await ask(`/api/log?limit=${entries}`)).entries); } catch { showUnreached(); }
  });
  $("unpair").addEventListener("click", async () => {
    try {
      await ask("/api/unpair", {});
      localStorage.removeItem(LAST);
      location.replace("/");
    } catch { tell(UNREACHED); }
  });
}

async function start() {
  listen();
  const last = JSON.parse(localStorage.getItem(LAST) ?? "{}");
  if (last.state) {
    state = last.state;
    showState();
    if (last.weeks) showWeeks(last.weeks);
    if (last.entries) showLog(last.entries);
    showUnreached();
  }
  try {
    const pair = await loadKey();
    key = pair && { pair, public: await publicOf(pair) };
  } catch { key = null; }
  await look();
  setInterval(() => { if (!document.hidden) look(); }, POLL_MS);
  setInterval(() => { if (!document.hidden && reached) lookWhole().catch(showUnreached); }, 30 * POLL_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  if ("serviceWorker" in navigator) navigator.serviceWorker.register("/sw.js").catch(() => {}); // without it: online only
}

start();
