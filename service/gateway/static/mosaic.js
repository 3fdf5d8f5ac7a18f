// The memory of a replica as a mosaic: a tile for each block, in the colour of the request that holds it.

import { html } from "./chart.js";
import { share } from "./format.js";

const TILE = 13;
const GAP = 2;
// Neighbouring letters get colours that are easy to tell apart.
const COLOURS = ["#1d6f72", "#d98e2b", "#b5482f", "#2e9c92", "#e6b65c", "#7a6aa8", "#7fb9a8", "#56803a", "#c96f86", "#4a7fb0"];

export class Mosaic {
  constructor(name) {
    this.title = html("h3", {}, name);
    this.canvas = html("canvas", { role: "img" });
    this.node = html("div", { class: "mosaic" }, this.title, this.canvas);
  }

  show(replica) {
    const { tiles } = replica;
    const used = replica.blocks - replica.free_blocks;
    const per = Math.ceil(replica.blocks / Math.max(tiles.length, 1));
    const note = per > 1 ? `, ${per} blocks a tile` : "";
    this.title.textContent = `${replica.name} · ${used} of ${replica.blocks} blocks used${note}`;
    const owners = new Set([...tiles].filter((tile) => tile >= "a")).size;
    const text = `${share(used / Math.max(replica.blocks, 1))} of the memory of ${replica.name} is used, by ${owners} requests`;
    this.canvas.setAttribute("aria-label", text);
    this.draw(tiles);
  }

  draw(tiles) {
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    const columns = Math.max(1, Math.floor((width + GAP) / (TILE + GAP)));
    const rows = Math.ceil(tiles.length / columns);
    const density = window.devicePixelRatio || 1;
    const height = rows * (TILE + GAP) - GAP;
    this.canvas.width = width * density;
    this.canvas.height = height * density;
    this.canvas.style.height = `${height}px`;
    const style = getComputedStyle(this.canvas);
    const plain = { ".": style.getPropertyValue("--tile-free"), "-": style.getPropertyValue("--tile-idle") };
    const context = this.canvas.getContext("2d");
    context.scale(density, density);
    [...tiles].forEach((tile, i) => {
      context.fillStyle = plain[tile] ?? (tile === "=" ? style.getPropertyValue("--ink") : colourOf(tile));
      context.beginPath();
      context.roundRect((i % columns) * (TILE + GAP), Math.floor(i / columns) * (TILE + GAP), TILE, TILE, 2.5);
      context.fill();
    });
  }
}

function colourOf(tile) {
  return COLOURS[(tile.charCodeAt(0) - "a".charCodeAt(0)) % COLOURS.length];
}

export function legend() {
  return [
    ["--tile-free", "free"],
    ["--tile-idle", "kept for prompts that begin alike"],
    ["--ink", "shared"],
  ];
}
