// Runs axe-core over every page of the built site: node docs/a11y.mjs build/site  (make a11y installs what it needs)
// In jsdom, so without a browser: rules that need layout, such as the contrast of colours, are not among them.
import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [site, packages] = process.argv.slice(2);
const require = createRequire(path.resolve(packages, "package.json"));
const { JSDOM, VirtualConsole } = require("jsdom");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const pages = readdirSync(site, { recursive: true }).filter((name) => name.endsWith(".html")).sort();
// The skeleton of the theme's pages, and Sphinx's signatures of more than a line.
const rules = Object.fromEntries(["region", "landmark-unique", "definition-list"].map((id) => [id, { enabled: false }]));
let found = pages.length ? 0 : 1;
for (const page of pages) {
  const html = readFileSync(path.join(site, page), "utf8").replace(/<script\b[^>]*>[\s\S]*?<\/script>/g, "");
  const { window } = new JSDOM(html, { runScripts: "outside-only", virtualConsole: new VirtualConsole() });
  window.eval(axe);
  const { violations } = await window.axe.run(window.document, { resultTypes: ["violations"], rules });
  for (const { id, impact, help, nodes } of violations) {
    found += nodes.length;
    console.error(`${page}: ${id} (${impact}): ${help}, ${nodes.length} times, such as ${nodes[0].html.slice(0, 120)}`);
  }
  window.close();
}
console.log(`${pages.length} pages, ${found} problems`);
process.exit(found ? 1 : 0);
