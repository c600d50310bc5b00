// The form of the limits: from what the car was allowed last to what the owner signs next.
const DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const DAY_MS = 86400000;
const START = {
  max_watts_w: 150, floor_pct: 40, ready_by_minute: null, target_pct: 80, schedule: [], quiet: [],
  share_while_charging: false, battery_watts_w: 0, battery_floor_pct: 50, budgets: {},
};

export function clock(minute) {
  return `${String(Math.floor(minute / 60)).padStart(2, "0")}:${String(minute % 60).padStart(2, "0")}`;
}

export function weekdays(mask) {
  return mask === 127 ? "every day" : DAYS.filter((_, day) => (mask >> day) & 1).join(", ");
}

function minuteOf(text) {
  const [hours, minutes] = text.split(":").map(Number);
  return hours * 60 + minutes;
}

function field(label, name, value, attributes) {
  const box = document.createElement("label");
  const words = document.createElement("span");
  words.textContent = label;
  const input = document.createElement("input");
  Object.assign(input, { name, value, required: true }, attributes);
  box.append(words, input);
  return box;
}

function tick(label, name, checked) {
  const box = document.createElement("label");
  box.className = "tick";
  const input = Object.assign(document.createElement("input"), { type: "checkbox", name, checked });
  box.append(input, document.createTextNode(label));
  return box;
}

function days(mask) {
  const box = document.createElement("span");
  box.className = "days";
  DAYS.forEach((day, index) => box.append(tick(day, "day", Boolean((mask >> index) & 1))));
  return box;
}

function maskOf(row) {
  return [...row.querySelectorAll("[name=day]")].reduce((mask, box, day) => mask | (box.checked ? 1 << day : 0), 0);
}

function row(kind, legend, mask, parts) {
  const set = document.createElement("fieldset");
  set.dataset.kind = kind;
  const title = document.createElement("legend");
  title.textContent = legend;
  const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
  remove.addEventListener("click", () => set.remove());
  set.append(title, days(mask), ...parts, remove);
  return set;
}

function wishRow(wish) {
  return row("wish", "I need the car", wish.weekdays, [
    field("at", "at", clock(wish.minute), { type: "time" }),
    field("with at least, %", "target", wish.target_pct, { type: "number", min: 0, max: 100, step: "any" }),
  ]);
}

function quietRow(quiet) {
  return row("quiet", "No work", quiet.weekdays, [
    field("from", "from", clock(quiet.from_minute), { type: "time" }),
    field("to", "to", clock(quiet.to_minute), { type: "time" }),
  ]);
}

function adder(label, form, make) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  button.addEventListener("click", () => form.insertBefore(make(), button));
  return button;
}

export function fillForm(form, grant, carMs) {
  const limits = { ...START, ...(grant?.limits ?? {}) };
  const wishes = [...limits.schedule];
  if (limits.ready_by_minute !== null) {
    wishes.unshift({ weekdays: 127, minute: limits.ready_by_minute, target_pct: limits.target_pct });
  }
  const left = grant ? Math.ceil((grant.expires_ms - carMs) / DAY_MS) : 365;
  const battery = document.createElement("details");
  battery.open = limits.battery_watts_w > 0;
  const summary = document.createElement("summary");
  summary.textContent = "Without the cable";
  const note = Object.assign(document.createElement("p"), { className: "small" });
  note.textContent = "Off unless you give it power here. It then works from the battery, which costs range and wears it.";
  battery.append(summary, note,
    field("Power from the battery, watts (0: never)", "battery_watts", limits.battery_watts_w, { type: "number", min: 0, max: 100000, step: 1 }),
    field("Never below this charge, %", "battery_floor", limits.battery_floor_pct, { type: "number", min: 0, max: 100, step: "any" }));
  const addWish = adder("Add a time at which I need the car", form, () => wishRow({ weekdays: 31, minute: 450, target_pct: 80 }));
  const addQuiet = adder("Add quiet hours", form, () => quietRow({ weekdays: 127, from_minute: 1320, to_minute: 360 }));
  const send = Object.assign(document.createElement("button"), { type: "submit", className: "big go", textContent: "Sign and allow" });
  form.replaceChildren(
    field("Power at most, watts", "watts", limits.max_watts_w, { type: "number", min: 1, max: 100000, step: 1 }),
    field("No work below this charge, %", "floor", limits.floor_pct, { type: "number", min: 0, max: 100, step: "any" }),
    field("Hours of work a week, at most", "hours", limits.budgets.compute_h_week ?? 60, { type: "number", min: 0, max: 168, step: "any" }),
    field("For so many days", "days", Math.max(1, left), { type: "number", min: 1, max: 3660, step: 1 }),
    tick("Work may take a part of the charging power if the battery is full in time all the same", "share", limits.share_while_charging),
    ...wishes.map(wishRow), addWish, ...limits.quiet.map(quietRow), addQuiet, battery, send,
  );
  form.dataset.budgets = JSON.stringify(limits.budgets);
}

export function readForm(form, carMs) {
  const value = (name) => form.elements[name].value;
  const part = (set, name) => set.querySelector(`[name=${name}]`).value;
  const rows = (kind) => [...form.querySelectorAll(`[data-kind=${kind}]`)].filter((set) => maskOf(set) > 0);
  return {
    expiresMs: carMs + Number(value("days")) * DAY_MS,
    limits: {
      max_watts_w: Number(value("watts")),
      floor_pct: Number(value("floor")),
      ready_by_minute: null,
      schedule: rows("wish").map((set) => ({
        weekdays: maskOf(set), minute: minuteOf(part(set, "at")), target_pct: Number(part(set, "target")),
      })),
      quiet: rows("quiet").map((set) => ({
        weekdays: maskOf(set), from_minute: minuteOf(part(set, "from")), to_minute: minuteOf(part(set, "to")),
      })),
      share_while_charging: form.elements.share.checked,
      battery_watts_w: Number(value("battery_watts")),
      battery_floor_pct: Number(value("battery_floor")),
      budgets: { ...JSON.parse(form.dataset.budgets), compute_h_week: Number(value("hours")) },
    },
  };
}
