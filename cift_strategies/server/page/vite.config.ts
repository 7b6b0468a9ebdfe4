import { defineConfig } from "vite";
import solid from "vite-plugin-solid";

// `npm run dev` shows the page of a node that runs with --port 8765; `npm run build` writes what the server hands out.
export default defineConfig({
  plugins: [solid()],
  base: "./",
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2022",
    reportCompressedSize: false,
    // One name for good: the built page is committed, and the server lets nothing be cached unasked.
    rollupOptions: { output: { entryFileNames: "assets/page.js", assetFileNames: "assets/page[extname]" } },
  },
  server: { proxy: { "/api": { target: "http://127.0.0.1:8765", ws: true } } },
});
