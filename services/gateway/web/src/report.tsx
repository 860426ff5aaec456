import { render } from "preact";
import { loadReport } from "./api/report";
import { ReportPage } from "./components/ReportPage";
import { browserStorage } from "./storage/browser";
import { storedSettings } from "./storage/settings";
import "./styles/index.css";

async function main(): Promise<void> {
  const root = document.getElementById("app")!;
  const { apiKey, model } = storedSettings(browserStorage()).peek();
  render(<ReportPage report={null} />, root);
  render(<ReportPage report={await loadReport(document.baseURI, model, apiKey)} />, root);
}

void main();
