// The makers' own JavaScript clients, fed with answers that a test brings on stdin: [{client, stream, type, status, body}].
// Prints for each what the client made of it, or the message of the error it threw. Nothing is sent anywhere.
import { text } from "node:stream/consumers";
import Anthropic from "@anthropic-ai/sdk";
import { GoogleGenAI } from "@google/genai";
import OpenAI from "openai";

let answer;
const PIECE = 11; // bytes: records and characters are cut anywhere

globalThis.fetch = async () => {
  const bytes = Buffer.from(answer.body, "base64");
  const body = new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += PIECE) controller.enqueue(new Uint8Array(bytes.subarray(at, at + PIECE)));
      controller.close();
    },
  });
  return new Response(body, { status: answer.status, headers: { "content-type": answer.type } });
};

const options = { apiKey: "sk-fake", maxRetries: 0, fetch: (...given) => globalThis.fetch(...given) };
const messages = [{ role: "user", content: "Read a." }];
const tools = [{ type: "function", function: { name: "read", parameters: { type: "object" } } }];

const clients = {
  async openai_chat(stream) {
    const api = new OpenAI(options).chat.completions;
    const asked = { model: "m", messages, tools };
    if (!stream) return api.create(asked);
    return api.stream({ ...asked, stream_options: { include_usage: true } }).finalChatCompletion();
  },
  async openai_responses(stream) {
    const api = new OpenAI(options).responses;
    const asked = { model: "m", input: messages };
    return stream ? api.stream(asked).finalResponse() : api.create(asked);
  },
  async anthropic(stream) {
    const api = new Anthropic(options).messages;
    const asked = { model: "m", max_tokens: 9, messages };
    return stream ? api.stream(asked).finalMessage() : api.create(asked);
  },
  async gemini(stream) {
    const api = new GoogleGenAI({ apiKey: "fake" }).models;
    const asked = { model: "m", contents: "Read a." };
    if (!stream) return api.generateContent(asked);
    const got = [];
    for await (const record of await api.generateContentStream(asked)) got.push(record);
    return got;
  },
};

const out = [];
for (answer of JSON.parse(await text(process.stdin))) {
  try {
    out.push({ got: await clients[answer.client](answer.stream) });
  } catch (error) {
    out.push({ threw: error.message, status: error.status ?? null });
  }
}
console.log(JSON.stringify(out));
