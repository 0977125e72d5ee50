// What the JavaScript client of the Hub does and gets, for tests/test_hub.py: node -e THIS hubUrl folder
import * as hf from "@huggingface/hub"
import { readFileSync } from "fs"
const [hubUrl, folder] = process.argv.slice(1)
const repo = { type: "model", name: "alice/js" }
const at = { hubUrl, repo, accessToken: "hf_write" }
const code = (promise) => promise.then(() => 0, (e) => e.statusCode)
const file = (path) => ({ path, content: new Blob([readFileSync(`${folder}/${path}`)]) })
const out = { listed: {}, same: [] }
out.who = (await hf.whoAmI(at)).name
await hf.createRepo({ ...at, visibility: "private" })
const paths = ["README.md", "m-Q2_K.gguf", "sub/m-Q4_K_M.gguf"]
await hf.uploadFiles({ ...at, files: paths.map(file), commitTitle: "upload" })
for await (const e of hf.listFiles({ ...at, recursive: true })) out.listed[e.path] = [e.size, e.lfs?.oid ?? null]
for (const path of paths) {
  const blob = await hf.downloadFile({ ...at, path })
  out.same.push(await blob.text() === await file(path).content.text())
}
const pull = { ...at, file: { path: "b.txt", content: new Blob(["b"]) }, isPullRequest: true }
out.pull = (await hf.uploadFile(pull)).pullRequestUrl
out.private = (await hf.modelInfo({ ...at, name: repo.name })).private
out.codes = [
  await code(hf.createRepo(at)),
  await code(hf.modelInfo({ hubUrl, name: repo.name })),
  await code(hf.uploadFiles({ ...at, accessToken: "hf_read", files: [file("README.md")] })),
]
console.log(JSON.stringify(out))
