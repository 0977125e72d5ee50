// What the JavaScript client of the Hub does and gets, for tests/test_hub.py: node -e THIS hubUrl folder
import * as hf from "@huggingface/hub"
import { readFileSync } from "fs"
const [hubUrl, folder] = process.argv.slice(1)
const repo = { type: "model", name: "alice/js" }
const at = { hubUrl, repo, accessToken: "hf_write" }
const all = async (items) => { const found = []; for await (const i of items) found.push(i); return found }
const code = (promise) => promise.then(() => 0, (e) => e.statusCode)
const file = (path) => ({ path, content: new Blob([readFileSync(`${folder}/${path}`)]) })
const out = {}
out.who = (await hf.whoAmI(at)).name
out.created = (await hf.createRepo({ ...at, visibility: "private" })).repoUrl
const files = ["README.md", "m-Q2_K.gguf", "sub/m-Q4_K_M.gguf"]
for (let n = 0; n < 2; n++) await hf.uploadFiles({ ...at, files: files.map(file), commitTitle: `upload ${n}` })
out.listed = await all(hf.listFiles({ ...at, recursive: true }))
out.infos = await hf.pathsInfo({ ...at, paths: files })
out.sizes = []
for (const path of files) {
  const blob = await hf.downloadFile({ ...at, path })
  out.sizes.push([path, await blob.text() === await file(path).content.text(), blob.size])
}
out.part = await (await hf.downloadFile({ ...at, path: files[2] })).slice(0, 4).text()
out.missing = await hf.downloadFile({ ...at, path: "none" })
out.exists = [await hf.fileExists({ ...at, path: files[0] }), await hf.fileExists({ ...at, path: "none" })]
const pull = { ...at, file: { path: "b.txt", content: new Blob(["b"]) }, isPullRequest: true }
out.pull = (await hf.uploadFile(pull)).pullRequestUrl
await hf.deleteFile({ ...at, path: "m-Q2_K.gguf" })
out.commits = (await all(hf.listCommits({ ...at, batchSize: 2 }))).map((c) => c.title)
out.info = (await hf.modelInfo({ ...at, name: repo.name })).private
out.codes = [
  await code(hf.createRepo(at)),
  await code(hf.whoAmI({ ...at, accessToken: "hf_none" })),
  await code(hf.modelInfo({ hubUrl, name: repo.name })),
  await code(hf.uploadFiles({ ...at, accessToken: "hf_read", files: [file("README.md")] })),
  await code(hf.deleteFile({ ...at, path: "README.md", parentCommit: "0".repeat(40) })),
]
await hf.deleteRepo(at)
console.log(JSON.stringify(out))
