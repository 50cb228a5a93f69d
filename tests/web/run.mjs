// node run.mjs CHECKPOINT JOBS.json: prints one line of JSON per job. A job is {scene: {…}} or {name of `other`: argument}.
import { readFile } from "node:fs/promises";
import path from "node:path";
import { answer, load, other } from "./cases.js";

const [checkpoint, jobs] = process.argv.slice(2);
const read = async (name) => {
  const { buffer, byteOffset, byteLength } = await readFile(path.join(checkpoint, name));
  return buffer.slice(byteOffset, byteOffset + byteLength);
};
const loaded = await load(read);
for (const job of JSON.parse(await readFile(jobs, "utf8"))) {
  const [[name, argument]] = Object.entries(job);
  if (argument.image) argument.image.data = Buffer.from(argument.image.data, "base64");
  console.log(JSON.stringify(name === "scene" ? answer(loaded, argument) : other[name](loaded, argument)));
}
