// Brings the one-time secret of the link back to the car. It stands behind the #, so that no log ever holds it.
const secret = location.hash.slice(1);
const told = document.getElementById("told");
const go = document.getElementById("go");
document.getElementById("ca").hidden = location.protocol !== "https:";

if (secret) {
  history.replaceState(null, "", "/pair");
  told.textContent = "Pair this phone with the car? From then on it shows what the car does, and can stop it.";
  go.hidden = false;
  go.addEventListener("click", pair);
}

async function pair() {
  go.disabled = true;
  try {
    const answer = await fetch("/api/pair", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Motorpool-Owner": "1" },
      body: JSON.stringify({ secret }),
    });
    if (answer.ok) {
      location.replace("/");
      return;
    }
    told.textContent = (await answer.json()).error.message;
    go.hidden = true;
  } catch {
    told.textContent = "The car cannot be reached. Are you in its Wi-Fi?";
    go.disabled = false;
  }
}
