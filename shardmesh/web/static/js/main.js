// Puts the page together: one feed, and views that render from its state at most once a frame.

import { ChainView } from "./chain.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { EventsView } from "./events.js";
import { Feed } from "./feed.js";
import { JoinView } from "./join.js";
import { ModelsView } from "./models.js";
import { NodeDialog } from "./node_dialog.js";
import { followSections, themeSwitch } from "./shell.js";
import { SummaryView } from "./summary.js";
import { WaterfallView } from "./waterfall.js";

const LIVE = { connecting: "connecting", live: "live", lost: "no connection, trying again", refused: "token needed" };

const dialog = new NodeDialog();
const openNode = (peerId) => dialog.open(peerId);
const chat = new Chat();
const events = new EventsView({ openNode });
const views = [
  new SummaryView(),
  new ChainView({ openNode }),
  new WaterfallView({ onChoice: () => render() }),
  new ModelsView({ openNode }),
  new JoinView(),
  dialog,
  chat,
  events,
];

let state = null;
let isDue = false;

function render() {
  if (isDue || !state) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    for (const view of views) view.render(state);
  });
}

function showStatus(status) {
  byId("live").dataset.state = status;
  byId("live").lastElementChild.textContent = LIVE[status];
  document.body.classList.toggle("is-stale", status === "lost");
  if (status === "live") events.loadNewest();
}

themeSwitch();
followSections();
const feed = new Feed({
  onState: (next) => {
    state = next;
    render();
  },
  onEvents: (fresh) => events.add(fresh),
  onStatus: showStatus,
});

// For tests and for the curious in the browser's tools.
window.shardmesh = { feed, get state() { return state; } };
